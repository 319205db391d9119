"""What this package overrides in vLLM, found by importing all of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import vllm_parallel_think


@dataclass(frozen=True)
class Override:
    """A function of ours that vLLM calls in place of its own.

    Attributes:
        ours: Dotted path of ours.
        theirs: Dotted path of vLLM's.
        mine: Our function.
        original: vLLM's.

    """

    ours: str
    theirs: str
    mine: Callable[..., Any]
    original: Callable[..., Any]


@cache
def overrides() -> tuple[Override, ...]:
    """Return every method of ours with the method of vLLM's that it shadows or stands for."""
    found = {(made.ours, made.theirs): made for made in _stand_ins()}
    for owner in _classes():
        mro = owner.__mro__
        for name in {name for base in mro if _is_ours(base) for name in vars(base)}:
            defining = [base for base in mro if name in vars(base)]
            mine = next(base for base in defining if _is_ours(base))
            theirs = next(
                (
                    base
                    for base in defining[defining.index(mine) + 1 :]
                    if base.__module__.split(".")[0] == "vllm"
                ),
                None,
            )
            if theirs is None:
                continue
            ours, original = (_function(vars(base)[name]) for base in (mine, theirs))
            if ours is None or original is None or _is_generated(ours):
                continue
            pair = (f"{_path(mine)}.{name}", f"{_path(theirs)}.{name}")
            found[pair] = Override(*pair, ours, original)
    return tuple(found[pair] for pair in sorted(found))


def _stand_ins() -> Iterator[Override]:
    """Return methods of a class that vLLM calls although it inherits from none of its own."""
    from vllm.parser.abstract_parser import Parser

    from vllm_parallel_think.frontend.tokenwise import TokenByToken

    paths = (f"{_path(owner)}.parse_delta" for owner in (TokenByToken, Parser))
    yield Override(*paths, TokenByToken.parse_delta, Parser.parse_delta)


def _classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(vllm_parallel_think.__path__, "vllm_parallel_think."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and value.__module__ == module.name:
                yield value


def _is_ours(owner: type) -> bool:
    return owner.__module__.split(".")[0] == "vllm_parallel_think"


def _function(value: Any) -> Callable[..., Any] | None:
    """Return the function behind a method of any kind."""
    found = getattr(value, "__func__", value)
    return found if inspect.isfunction(found) else None


def _is_generated(function: Callable[..., Any]) -> bool:
    """Whether a function was written by `dataclass`, which makes it fit."""
    code = getattr(function, "__wrapped__", function).__code__
    return str(code.co_filename).startswith("<")


def _path(owner: type) -> str:
    return f"{owner.__module__}.{owner.__qualname__}"
