"""Replacing a method of vLLM where it offers no hook: once, and only if it is the one we know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import vllm

from ..core.errors import OptionError

_replaced: set[tuple[type, str]] = set()


def patch(
    owner: type, name: str, make: Callable[[Callable[..., Any]], Any], needs: tuple[str, ...] = ()
) -> None:
    """Replace a method; a second call for the same method does nothing.

    Args:
        owner: The class that has the method.
        name: The method's name.
        make: Returns the replacement of the function it is given. For a classmethod that is the
            function behind it, and the replacement becomes a classmethod again.
        needs: Parameters that the replacement relies on.

    Raises:
        OptionError: This vLLM has no such method, or it lost a parameter.

    """
    if (owner, name) in _replaced:
        return
    found = getattr(owner, name, None)
    original = getattr(found, "__func__", found)
    if not callable(original) or not set(needs) <= set(inspect.signature(original).parameters):
        raise OptionError(
            f"vLLM {vllm.__version__} has no {owner.__module__}.{owner.__qualname__}.{name}"
            f"({', '.join(needs)}), which parallel_think replaces: install a supported vLLM, or "
            "remove parallel_think from --additional-config"
        )
    replacement = make(original)
    setattr(owner, name, classmethod(replacement) if inspect.ismethod(found) else replacement)
    _replaced.add((owner, name))
