"""The tags of a profile, and its path heads: what each path starts with, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..branch_graph import PathName
from ..config.profile import ForkRule, JoinRule, PathRule, Profile
from .cursor import Cursor, GrammarError
from .wording import loose, text_of

TAG = re.compile(r"</?[A-Za-z][\w-]*>")


class Tags:
    """The tags of a profile by their part in a block."""

    def __init__(self, fork: ForkRule, path: PathRule, join: JoinRule) -> None:
        openings = [tag for tag in map(str, fork.trigger) if opens(tag)]
        block = fork.open or fork.names_after or (openings[0] if openings else None)
        self.block = str(block) if block is not None else None
        self.outline = str(fork.names_after) if fork.names_after is not None else None
        self.items = TAG.findall(fork.names or "")
        self.join = TAG.findall(text_of(join.start))
        named = [*fork.trigger, *path.end, *path.start, *path.close, *join.start, *self.items]
        named += [tag for tag in (fork.open, fork.names_after, path.open) if tag is not None]
        found = {tag for text in named for tag in TAG.findall(str(text))}
        found |= {"</" + tag[1:] if opens(tag) else "<" + tag[2:] for tag in found}
        self.all = frozenset(found)
        others = [*found, *map(str, fork.trigger), *map(str, path.end)]
        self.lexer = re.compile(
            "|".join(sorted(map(re.escape, set(others)), key=len, reverse=True))
        )


def opens(tag: str) -> bool:
    """Say whether a text is an opening tag."""
    return TAG.fullmatch(tag) is not None and not tag.startswith("</")


class Heads:
    """The heads that a profile gives its paths, and errors about those in a text."""

    def __init__(self, profile: Profile, tags: Tags, cursor: Cursor) -> None:
        self._profile = profile
        self._tags = tags
        self._cursor = cursor

    def text(self, name: PathName, index: int) -> str:
        """Return what the engine writes before a block's path number ``index``, from 0."""
        head = text_of(self._profile.path.start, name)
        return head.removeprefix(text_of(self._profile.join.first_only)) if index else head

    def pattern(self, index: int, *, exact: bool = False) -> re.Pattern[str]:
        """Return what a path's head looks like, whatever its name; group 1 is the name, if any.

        Args:
            index: Number of the path in its block, from 0.
            exact: Whether white space must be the engine's.

        """
        head = self.text(PathName("{name}", "{title}", "{tag}"), index)
        form = re.escape(head) if exact else loose(head)
        pattern = form.replace(re.escape("{name}"), r"([^\s:<]+?)", 1)
        pattern = pattern.replace(re.escape("{tag}"), "[0-9]+")
        return re.compile(pattern.replace(re.escape("{title}"), r"[^\n]*?"))

    def wrong(
        self, names: Sequence[PathName], index: int, offset: int | None = None
    ) -> GrammarError:
        """Say what is wrong where the path ``names[index]`` must start."""
        offset = self._cursor.pos if offset is None else offset
        allowed = [repr(self.text(names[index], index).strip())]
        found = self.pattern(index).match(self._cursor.text, offset)
        name = found[1] if found is not None and found.re.groups else None
        if name is None or name == names[index].name:
            reason = f"path {names[index].name!r} is missing"
        elif name in {before.name for before in names[:index]}:
            reason = f"duplicate path name {name!r}"
        elif name in {later.name for later in names}:
            reason = f"wrong path name {name!r}: path {names[index].name!r} comes first"
        else:
            reason = f"wrong path name {name!r}: no outline has it"
        return self._cursor.error(reason, allowed, offset)

    def surplus(self, names: Sequence[PathName], found: re.Match[str]) -> GrammarError:
        """Say what is wrong with a path after the last one of its block."""
        allowed = [repr(text_of(self._profile.join.start))] if self._tags.join else self._closers()
        if not found.re.groups:
            reason = f"path {len(names) + 1} is one more than the {len(names)} the profile opens"
        elif found[1] in {name.name for name in names}:
            reason = f"duplicate path name {found[1]!r}"
        else:
            reason = f"path {found[1]!r} has no outline"
        return self._cursor.error(reason, allowed, found.start())

    def _closers(self) -> list[str]:
        return [] if self._tags.block is None else [self._tags.block.replace("<", "</", 1)]
