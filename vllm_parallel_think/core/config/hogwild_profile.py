"""Hogwild profiles: one data file per way of letting workers think side by side.

Such a profile holds every word that the engine writes for the workers: rules, headers, names, the
start of a step, the redundancy check, the text that forces an answer. Its table ``[workers]`` sets
it apart from other profiles; a client can only name one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from ..errors import OptionError, quoted

Text = tuple[str | int, ...]
"""Text the engine writes: pieces of text (``{name}``, ``{number}``, ``{others}`` are filled in) or
token ids."""

Layout = Literal["combined", "interleaved", "contiguous"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

MAX_WORKERS = 16

MOST = 2**31 - 1
"""Largest number that a profile may hold: what counts tokens is no longer, in every process."""

NAME_CHARACTERS = 64
"""Longest name of a profile or a worker."""

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """Who works, and how their steps look.

    Attributes:
        names: Names, in the order in which workers are numbered.
        num_workers: Workers of a request that asks for no other number.
        max_tokens: Tokens that each worker may sample, unless the request says otherwise.
        layout: How a worker sees the others, unless the request says otherwise: ``combined``
            (finished steps in order of completion, then the others' unfinished ones),
            ``interleaved`` (others' steps only when finished), ``contiguous`` (each worker's steps
            in one piece).
        step: Forced at the start of every step.
        others: Header before what the others have not finished.
        own: Separator and header before a worker's own unfinished step.
        end: Tokens that end a step; empty for the paper's rule, a blank line after a sentence and
            outside code and math.
        close: Forced after a step that did not come to such an end, where another one follows it;
            ``None`` is a blank line by the paper's rule, and nothing with an ``end``.
        max_step_tokens: Most tokens sampled in one step; ``None`` is unlimited.

    """

    names: tuple[str, ...]
    num_workers: int = 2
    max_tokens: int = 1024
    layout: Layout = "combined"
    step: Text = ()
    others: Text = ()
    own: Text = ()
    end: Text = ()
    close: Text | None = None
    max_step_tokens: int | None = None


@dataclass(frozen=True)
class Check:
    """The question whether a worker repeats what another one does.

    Attributes:
        every: Tokens, of all workers together, from one check to the next; 0 never asks.
        text: Forced after the start of a step; the worker writes yes or no.

    """

    every: int = 0
    text: Text = ()


@dataclass(frozen=True)
class Ending:
    """How the answer comes about.

    Attributes:
        marks: A finished step with any of these texts holds the answer. Without marks it is the
            worker that ends the text who has answered; with them such a worker only stops.
        found: Forced when a worker has answered; empty ends there and then.
        forced: Forced when the budget is used up, over everything that was written.
        max_tokens: Tokens kept for what is written after the forced text, and most of that.

    """

    forced: Text
    marks: tuple[str, ...] = ()
    found: Text = ()
    max_tokens: int = 64


@dataclass(frozen=True)
class HogwildProfile:
    """What the engine writes for the workers of a request.

    Attributes:
        name: Name that requests use.
        summary: One line for people.
        opening: Rules after the prompt; the client does not see them.

    """

    name: str
    summary: str
    workers: Workers
    answer: Ending
    check: Check = Check()
    opening: Text = ()


def parse_hogwild_profile(raw: Mapping[str, Any], source: str) -> HogwildProfile:
    """Check a profile for workers that was read from TOML.

    Args:
        raw: The file's tables.
        source: What to call the file in error messages.

    Raises:
        OptionError: Names the key and what is allowed there.

    """
    where = f"profile {source}"
    values = dict(raw)
    for key, kind in (("workers", Workers), ("answer", Ending), ("check", Check)):
        table = values.get(key, {} if key == "check" else None)
        if not isinstance(table, Mapping):
            raise OptionError(f"{where}: the table [{key}] is missing")
        values[key] = _build(kind, table, f"{where}, [{key}]")
    profile = _build(HogwildProfile, values, where)
    _check(profile, where)
    return profile


_TEXTS = {"opening", "step", "others", "own", "end", "close", "text", "found", "forced"}
_NAMES = {"names", "marks"}
_WHOLE = {"num_workers", "max_tokens", "every", "max_step_tokens"}


def _build(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := set(table) - known:
        raise OptionError(f"{where}: unknown key {quoted(min(unknown))}; allowed: {sorted(known)}")
    values = {key: _value(key, value, where) for key, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        missing = str(error).split("argument", 1)[-1].lstrip("s: ")
        raise OptionError(f"{where}: missing key {missing}") from None


def _value(key: str, value: Any, where: str) -> Any:
    if key in _TEXTS or key in _NAMES:
        items = value if isinstance(value, list) else [value]
        kinds = (str, int) if key in _TEXTS else (str,)
        for item in items:
            if isinstance(item, bool) or not isinstance(item, kinds):
                allowed = "text or token ids" if key in _TEXTS else "texts"
                raise OptionError(f"{where}: {key} must be {allowed}, got {quoted(item)}")
        if key == "names":
            for item in items:
                check_name(item, f"{where}: each of names")
        return tuple(item for item in items if item != "")
    if key in _WHOLE and (isinstance(value, bool) or not isinstance(value, int)):
        raise OptionError(f"{where}: {key} must be a whole number, got {quoted(value)}")
    if key == "layout" and value not in LAYOUTS:
        raise OptionError(
            f"{where}: layout must be one of {', '.join(LAYOUTS)}, got {quoted(value)}"
        )
    if key in ("name", "summary") and not isinstance(value, str):
        raise OptionError(f"{where}: {key} must be text, got {quoted(value)}")
    return value


def _check(profile: HogwildProfile, where: str) -> None:
    workers, check, answer = profile.workers, profile.check, profile.answer
    check_name(profile.name, f"{where}: name")
    if not 1 <= workers.num_workers <= len(workers.names) <= MAX_WORKERS:
        raise OptionError(
            f"{where}, [workers]: names must list between num_workers "
            f"({quoted(workers.num_workers)}) and {MAX_WORKERS} names, got {len(workers.names)}"
        )
    if workers.num_workers > 1 and not workers.step:
        raise OptionError(
            f"{where}, [workers]: step must not be empty: workers that start alike write alike"
        )
    least = {
        "[workers] max_tokens": (workers.max_tokens, 1),
        "[workers] max_step_tokens": (workers.max_step_tokens, 1),
        "[check] every": (check.every, 0),
        "[answer] max_tokens": (answer.max_tokens, 1),
    }
    for key, (value, low) in least.items():
        if value is not None and not low <= value <= MOST:
            allowed = f"at least {low}" if value < low else f"at most {MOST}"
            raise OptionError(f"{where}, {key} must be {allowed}, got {quoted(value)}")
    if check.every and not check.text:
        raise OptionError(f"{where}, [check]: text must not be empty where every is set")
    if not answer.forced:
        raise OptionError(f"{where}, [answer]: forced must not be empty")


def check_name(name: str, where: str) -> None:
    """Refuse a name that requests could not send, or that would not fit a line of a log.

    Raises:
        OptionError: Says what a name is.

    """
    if not name.strip() or not name.isprintable() or len(name) > NAME_CHARACTERS:
        raise OptionError(
            f"{where} must be 1 to {NAME_CHARACTERS} characters without line breaks, "
            f"got {quoted(name)}"
        )
