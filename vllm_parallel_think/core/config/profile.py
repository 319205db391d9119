"""Profiles: one data file per grammar of parallel thinking.

A profile says which tags the model writes, which tokens the engine writes for it, and which
positions paths and conclusions get. Profiles are TOML files read at server start; a client can only
name one.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import OptionError, quoted, shortened
from .hogwild_profile import MOST, HogwildProfile, check_name, parse_recipe

Tag = str | int
"""A tag the model writes: its text, or the id of a single special token."""

Forced = tuple[Tag, ...]
"""Text the engine writes: pieces of text (``{name}``, ``{title}`` are filled in) or token ids."""

T = TypeVar("T")

MAX_PATHS_LIMIT = 64
"""Most paths that one fork may have, whatever anybody sets."""


@dataclass(frozen=True)
class ForkRule:
    """When a branch forks, and what its paths are called.

    Attributes:
        trigger: Any of these tags, once generated, forks.
        open: Tag that must have been generated before the trigger; ``None`` asks for none.
        names_after: The names are read from the text behind the last occurrence of this tag.
        names: Regular expression; group 1 is a path's name, group 2 (if any) its title.
        num_paths: Number of paths for grammars whose blocks do not name them (``names`` absent).
        min_tokens_left: No fork when fewer tokens than this are left in the request's budget.
        on_end: An end-of-sequence token forks too, if enough names were written.
        max_outline_tokens: Fork after this many tokens of a branch, if enough names were written.
        when_full: Fork as soon as ``max_paths`` names were written and the line is complete.
        once: Only the first branch of a request may fork.
        at_start: The answer forks right behind the prompt, before anything is generated; the client
            may choose the number of paths. Such a profile has no ``trigger``.
        after: Forced once behind the trigger, in front of all paths; the first path's position is
            that of its own first token all the same.

    """

    trigger: tuple[Tag, ...] = ()
    open: Tag | None = None
    names_after: Tag | None = None
    names: str | None = None
    num_paths: int | None = None
    min_tokens_left: int = 0
    on_end: bool = False
    max_outline_tokens: int | None = None
    when_full: bool = False
    once: bool = False
    at_start: bool = False
    after: Forced = ()


@dataclass(frozen=True)
class PathRule:
    """How a path starts and ends.

    Attributes:
        start: Forced at the start of a path; must not be empty.
        end: Any of these tags, once generated, ends the path.
        close: Forced when a path ends in any other way (end of sequence, budget).
        after: Forced behind every path's end tag; does not count for the conclusion's position.
        stride: Path ``i`` (from 0) starts at the position behind the trigger plus ``i * stride``;
            0 starts all of them there.
        num_tags: How many paths the model's control tokens tell apart: ``{tag}`` in ``start`` and
            ``close`` counts from 1 to this and starts again; ``None`` never starts again.
        open: Tag a model writes to open a path by itself; pairs with ``end`` in sequential blocks.
        max_tokens: Budget of a path unless the request sets its own; ``None`` is unlimited.

    """

    start: Forced
    end: tuple[Tag, ...] = ()
    close: Forced = ()
    after: Forced = ()
    stride: int = 0
    num_tags: int | None = None
    open: Tag | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class OutlineRule:
    """How an outline comes about that the client does not see.

    Attributes:
        tries: Places of an answer in which a list is looked for, before it goes on as text.
        max_title_tokens: A heading longer than this is none.
        invite: Whether the first number is written for the model behind a paragraph; behind a colon
            a list is always the model's own idea.

    """

    tries: int = 2
    max_title_tokens: int = 24
    invite: bool = False


@dataclass(frozen=True)
class StartRule:
    """A conclusion's start in answers that read like something.

    Attributes:
        match: Regular expression that is looked for in the text in front of the list and its
            titles.
        start: Forced in place of ``[join] start``.

    """

    match: str
    start: Forced


@dataclass(frozen=True)
class JoinRule:
    """How the conclusion starts.

    Attributes:
        start: Forced at the start of the conclusion; must not be empty.
        mode: ``kv`` reuses the K/V of all paths; ``reprefill`` computes a linear, causal copy.
        position: Where a conclusion over reused K/V starts: behind the ``longest`` path (the one
            that reaches furthest), or behind the ``total`` of all paths laid end to end. A linear
            copy has the positions of its text.
        first_only: Forced text at the start of every path that only the first one keeps in the
            answer (it must be how ``[path] start`` begins).
        end: Any of these tags, once generated in a conclusion of the trunk, ends the answer; empty
            for models that end it themselves.
        starts: Other starts, for answers in other languages; the first that matches is taken.

    """

    start: Forced
    mode: Literal["kv", "reprefill"] = "kv"
    position: Literal["longest", "total"] = "longest"
    first_only: Forced = ()
    end: tuple[Tag, ...] = ()
    starts: tuple[StartRule, ...] = ()


@dataclass(frozen=True)
class Profile:
    """A grammar of parallel thinking (see ``docs`` of each rule).

    Attributes:
        name: Name that requests use.
        summary: One line for people.
        outline: How the paths' titles are found out, for models that write no outline.
        opening: Forced at the very start of the answer; empty for models trained on a grammar.
        max_depth: Deepest nesting of the grammar, whatever the server allows.

    """

    name: str
    summary: str
    fork: ForkRule
    path: PathRule
    join: JoinRule
    outline: OutlineRule | None = None
    opening: Forced = ()
    max_depth: int = 8

    @property
    def tags(self) -> tuple[Tag, ...]:
        """All tags that mean something when the model writes them."""
        single = (self.fork.open, self.fork.names_after, self.path.open)
        several = (*self.fork.trigger, *self.path.end, *self.join.end)
        return (*several, *(tag for tag in single if tag is not None))

    @property
    def all_tags(self) -> tuple[Tag, ...]:
        """Every text and token id of the profile, those that are forced included."""
        fork, path, join = self.fork, self.path, self.join
        forced = (*self.opening, *fork.after, *path.start, *path.close, *path.after)
        starts = (tag for rule in join.starts for tag in rule.start)
        return (*self.tags, *forced, *join.start, *starts, *join.first_only)


_SCALARS: dict[str, type | tuple[type, ...]] = {
    "names": str,
    "num_paths": int,
    "min_tokens_left": int,
    "max_outline_tokens": int,
    "max_tokens": int,
    "max_depth": int,
    "stride": int,
    "num_tags": int,
    "at_start": bool,
    "on_end": bool,
    "when_full": bool,
    "once": bool,
    "invite": bool,
    "tries": int,
    "max_title_tokens": int,
    "match": str,
    "mode": str,
    "position": str,
    "name": str,
    "summary": str,
    "open": (str, int),
    "names_after": (str, int),
}
_LISTS = {"trigger", "end", "start", "close", "opening", "after", "first_only"}


_TABLES: dict[str, type] = {
    "outline": OutlineRule,
    "fork": ForkRule,
    "path": PathRule,
    "join": JoinRule,
}


def builtin_profiles() -> tuple[str, ...]:
    """Return the names of the profiles that ship with the package."""
    folder = resources.files("vllm_parallel_think") / "profiles"
    return tuple(sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".toml")))


def load_profile(name_or_path: str) -> Profile | HogwildProfile:
    """Load a built-in profile by name, or a profile file by its path (ending in ``.toml``).

    Raises:
        OptionError: The profile is unknown, or the file is not a valid profile.

    """
    if name_or_path.endswith(".toml"):
        path, source = Path(name_or_path), shortened(name_or_path, 500)
        try:
            if not path.is_file():
                raise OptionError(f"profile file {quoted(name_or_path)} does not exist")
            return parse_profile(path.read_text("utf-8"), source=source)
        except UnicodeDecodeError as error:
            raise OptionError(f"profile {source}: not UTF-8 text: {error}") from None
        except OSError as error:
            raise OptionError(f"profile {source} cannot be read: {error.strerror}") from None
    if name_or_path not in builtin_profiles():
        raise OptionError(
            f"unknown profile {quoted(name_or_path)}; allowed: {', '.join(builtin_profiles())}, "
            "or the path of a .toml file"
        )
    resource = resources.files("vllm_parallel_think") / "profiles" / f"{name_or_path}.toml"
    return parse_profile(resource.read_text("utf-8"), source=name_or_path)


def parse_profile(text: str, source: str) -> Profile | HogwildProfile:
    """Parse a profile, or a recipe for workers, from TOML.

    Args:
        text: The file's content.
        source: What to call the file in error messages.

    Raises:
        OptionError: Names the key and what is allowed there.

    """
    try:
        raw = tomllib.loads(text)
    except RecursionError:
        raise OptionError(f"profile {source}: its values are nested too deeply") from None
    except ValueError as error:  # a number of too many digits is one, too
        raise OptionError(f"profile {source}: not valid TOML: {shortened(str(error))}") from None
    if "workers" in raw:
        return parse_recipe(raw, source)
    tables: dict[str, Any] = {}
    drafts = "outline" in raw
    for key, rule in _TABLES.items():
        table = raw.pop(key, None)
        if table is None and key == ("fork" if drafts else "outline"):
            tables[key] = ForkRule() if drafts else None
            continue
        if not isinstance(table, dict):
            raise OptionError(f"profile {source}: the table [{key}] is missing")
        if key == "join":
            table = {**table, "starts": _starts(table.get("starts", []), source)}
        tables[key] = _build(rule, table, f"profile {source}, [{key}]")
    profile = _build(Profile, {**raw, **tables}, f"profile {source}")
    _check(profile, source)
    return profile


def _starts(value: object, source: str) -> tuple[StartRule, ...]:
    where = f"profile {source}, [[join.starts]]"
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise OptionError(f"{where}: expected tables with match and start, got {quoted(value)}")
    starts = tuple(_build(StartRule, item, where) for item in value)
    for rule in starts:
        if not rule.start:
            raise OptionError(f"{where}: start must not be empty: a join needs a first token")
        compiled(rule.match, f"{where}: match")
    return starts


def _build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := set(table) - names:
        raise OptionError(f"{where}: unknown key {quoted(min(unknown))}; allowed: {sorted(names)}")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in _LISTS:
            values[key] = _tags(value, f"{where}, {key}")
        elif key in _SCALARS and not _is_a(value, _SCALARS[key]):
            raise OptionError(f"{where}: {key} has the wrong type: {quoted(value)}")
        else:
            values[key] = value
    try:
        return cls(**values)
    except TypeError as error:
        missing = str(error).split("argument", 1)[-1].lstrip("s: ")
        raise OptionError(f"{where}: missing key {missing}") from None


def _is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind)


def _tags(value: object, where: str) -> tuple[Tag, ...]:
    items = value if isinstance(value, list) else [value]
    tags: list[Tag] = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int)):
            raise OptionError(f"{where}: expected text or a token id, got {quoted(item)}")
        tags.append(item)
    return tuple(tag for tag in tags if tag != "")


def _check(profile: Profile, source: str) -> None:
    where = f"profile {source}"
    check_name(profile.name, f"{where}: name")
    if not profile.path.start:
        raise OptionError(f"{where}, [path]: start must not be empty: a path needs a first token")
    if not profile.join.start:
        raise OptionError(f"{where}, [join]: start must not be empty: a join needs a first token")
    if profile.outline is not None:
        _check_outline(profile, where)
    elif bool(profile.fork.trigger) == profile.fork.at_start or not profile.path.end:
        raise OptionError(
            f"{where}: [fork] trigger (or at_start) and [path] end must name at least one tag"
        )
    if profile.fork.at_start and (profile.fork.num_paths is None or profile.max_depth > 1):
        raise OptionError(f"{where}, [fork]: at_start needs num_paths, and max_depth = 1")
    if any(tag == "" or (isinstance(tag, int) and tag < 0) for tag in profile.all_tags):
        raise OptionError(f"{where}: tags must be text, not empty, or token ids of at least 0")
    spans = {
        "[fork] num_paths": (profile.fork.num_paths, 2, MAX_PATHS_LIMIT),
        "[fork] min_tokens_left": (profile.fork.min_tokens_left, 0, MOST),
        "[fork] max_outline_tokens": (profile.fork.max_outline_tokens, 1, MOST),
        "[path] max_tokens": (profile.path.max_tokens, 1, MOST),
        "[path] num_tags": (profile.path.num_tags, 1, MOST),
        "max_depth": (profile.max_depth, 1, MOST),
    }
    if profile.outline is not None:
        spans["[outline] tries"] = (profile.outline.tries, 1, MOST)
        spans["[outline] max_title_tokens"] = (profile.outline.max_title_tokens, 1, MOST)
    for key, (value, low, high) in spans.items():
        if value is not None and not low <= value <= high:
            allowed = f"at least {low}" if value < low else f"at most {high}"
            raise OptionError(f"{where}, {key} must be {allowed}, got {quoted(value)}")
    if profile.join.mode not in ("kv", "reprefill"):
        raise OptionError(f"{where}, [join]: mode must be 'kv' or 'reprefill'")
    if profile.join.position not in ("longest", "total"):
        raise OptionError(f"{where}, [join]: position must be 'longest' or 'total'")
    stride = profile.path.stride
    if not 0 <= stride <= MOST or (stride and profile.max_depth > 1):
        raise OptionError(
            f"{where}, [path]: stride must be 0 or more (at most {MOST}), and 0 if max_depth is "
            "above 1"
        )
    first = "".join(map(str, profile.join.first_only))
    if not "".join(map(str, profile.path.start)).startswith(first):
        raise OptionError(f"{where}, [join]: first_only must be how [path] start begins")
    if profile.outline is None and (
        (profile.fork.names is None) == (profile.fork.num_paths is None)
    ):
        raise OptionError(f"{where}, [fork]: set exactly one of names and num_paths")
    if profile.fork.names is not None:
        names = compiled(profile.fork.names, f"{where}, [fork]: names")
        if names.groups < 1:
            raise OptionError(f"{where}, [fork]: names needs a group for the path's name")
        if names.search(""):
            raise OptionError(f"{where}, [fork]: names must not match an empty text")


def compiled(pattern: object, where: str) -> re.Pattern[str]:
    """Return an operator's regular expression.

    Raises:
        OptionError: It is none, or one that Python cannot compile.

    """
    if not isinstance(pattern, str):
        raise OptionError(f"{where} must be a regular expression, got {quoted(pattern)}")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        reason = shortened(str(error))
        raise OptionError(f"{where} must be a regular expression: {reason}") from None


def _check_outline(profile: Profile, where: str) -> None:
    fork, path, join = profile.fork, profile.path, profile.join
    if fork != ForkRule(min_tokens_left=fork.min_tokens_left):
        raise OptionError(f"{where}, [fork]: beside [outline] only min_tokens_left is allowed")
    if profile.max_depth > 1:
        raise OptionError(f"{where}: [outline] needs max_depth = 1")
    if path.end or join.end:
        raise OptionError(
            f"{where}: beside [outline], [path] and [join] have no end: points end by themselves"
        )
    if path.stride or path.num_tags is not None or path.open is not None or join.first_only:
        raise OptionError(
            f"{where}: beside [outline], stride, num_tags, open and first_only are not allowed"
        )
    if not all(isinstance(tag, str) for tag in path.close):
        raise OptionError(f"{where}, [path]: beside [outline], close must be text")
