"""Profiles from TOML files, which are read and checked at server start."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ..errors import OptionError, quoted, shortened
from .hogwild_profile import MOST, HogwildProfile, check_name, parse_hogwild_profile
from .profile import (
    MAX_PATHS_LIMIT,
    ForkRule,
    JoinRule,
    OutlineRule,
    PathRule,
    Profile,
    StartRule,
    Tag,
)

T = TypeVar("T")

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
    """Parse a profile, or one for workers (a table ``[workers]`` shows that), from TOML.

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
        return parse_hogwild_profile(raw, source)
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
