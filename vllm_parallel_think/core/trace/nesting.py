"""Checking the tags that a model wrote against those that are open where they stand."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..branch_graph import PathName
from ..config.profile import Profile
from ..fork_join.tag_scanner import ForkSeen
from .cursor import Cursor, GrammarError
from .heads import Heads, Tags, opens
from .wording import loose


@dataclass
class Frame:
    """An open tag (or a lane, which has no tag) and what must still come inside it."""

    tag: str | None
    offset: int
    names: tuple[PathName, ...] = ()
    num_seen: int = 0
    join: list[str] = field(default_factory=list)
    outlined: bool = False
    may_stay_open: bool = False

    @property
    def close(self) -> list[str]:
        """The tag that closes the frame, if it takes one."""
        return [] if self.tag is None else [self.tag.replace("<", "</", 1)]


class Nesting:
    """Checks the tags in generated text; lists of frames have the innermost last.

    Attributes:
        num_sequential: Blocks that the model wrote one path after the other.

    """

    def __init__(self, profile: Profile, tags: Tags, heads: Heads, cursor: Cursor) -> None:
        self._profile = profile
        self._tags = tags
        self._heads = heads
        self._cursor = cursor
        self.num_sequential = 0

    def start_sequential(self, seen: ForkSeen, top: Frame) -> None:
        """Expect a block's paths in the generated text: it does not fork."""
        self.num_sequential += 1
        top.outlined = True
        top.names, top.num_seen, top.join = seen.names, 0, list(self._tags.join)

    def visit(self, tag: str, offset: int, frames: list[Frame]) -> None:
        """Check a tag that the model wrote against the tags that are open."""
        top = frames[-1]
        if not opens(tag):
            self._visit_close(tag, offset, frames)
            return
        if top.num_seen < len(top.names):
            head = self._heads.text(top.names[top.num_seen], top.num_seen).strip()
            if not re.compile(loose(head)).match(self._cursor.text, offset):
                raise self._heads.wrong(top.names, top.num_seen, offset)
            top.num_seen += 1
        elif top.join:
            if tag != top.join[0]:
                raise self._not_joined(top, offset)
            top.join.pop(0)
        elif tag not in self._children(top):
            raise self._misplaced(tag, top, offset)
        frames.append(Frame(tag, offset))

    def _visit_close(self, tag: str, offset: int, frames: list[Frame]) -> None:
        top = frames[-1]
        self.check_complete(top, offset, tag)
        if top.close != [tag]:
            allowed = self._children(top) + top.close
            if top.tag is None:
                raise self._cursor.error(f"{tag} closes nothing", allowed or ["text"], offset)
            line, column = self._cursor.place(top.offset)
            reason = f"{top.tag} of line {line}, column {column} is not closed"
            raise self._cursor.error(reason, allowed, offset)
        frames.pop()
        if top.join:
            frames[-1].join = top.join[1:]

    def check_complete(self, top: Frame, offset: int, tag: str | None = None) -> None:
        """Refuse to leave a frame that still lacks an outline, a path or a conclusion."""
        if top.num_seen < len(top.names):
            raise self._heads.wrong(top.names, top.num_seen, offset)
        if top.join and tag != top.join[0]:
            raise self._not_joined(top, offset)
        leaves_block = tag is not None and top.close == [tag] and top.tag == self._tags.block
        if leaves_block and not top.outlined and self._tags.outline not in (None, top.tag):
            raise self._cursor.error(f"{top.tag} has no outline", [str(self._tags.outline)], offset)

    def _not_joined(self, top: Frame, offset: int) -> GrammarError:
        found = self._heads.pattern(top.num_seen).match(self._cursor.text, offset)
        if found is not None:
            return self._heads.surplus(top.names, found)
        return self._cursor.error("the conclusion is missing", [top.join[0]], offset)

    def _children(self, top: Frame) -> list[str]:
        """Return the tags that may open inside a frame in which nothing is due."""
        tags = self._tags
        if top.tag is not None and top.tag == (tags.outline or (tags.items and tags.block)):
            return [item for item in tags.items if opens(item)]
        if top.tag in tags.items:
            return []
        if top.tag is not None and top.tag == tags.block:
            return [] if top.outlined or tags.outline is None else [tags.outline]
        return [] if tags.block is None else [tags.block]

    def _misplaced(self, tag: str, top: Frame, offset: int) -> GrammarError:
        where = "outside a block" if top.tag is None else f"inside {top.tag}"
        if top.outlined and (found := self._heads.pattern(1).match(self._cursor.text, offset)):
            where = "behind the block's last path"
            if found.re.groups:
                return self._heads.surplus(top.names, found)
        return self._cursor.error(
            f"{tag} {where}", self._children(top) + top.close or ["text"], offset
        )

    def check_path(self, tag: str, offset: int, frames: list[Frame]) -> None:
        """Refuse a path's end that leaves tags open inside the path."""
        top = frames[-1]
        if top.tag is not None and tag in self._tags.all:
            line, column = self._cursor.place(top.offset)
            reason = f"{tag} ends the path, but {top.tag} of line {line}, column {column} is open"
            raise self._cursor.error(reason, top.close, offset)

    def check_end(self, frames: list[Frame], depth: int) -> None:
        """Refuse a text that ends inside a path or an open tag."""
        top = frames[-1]
        if depth or (top.tag is not None and not top.may_stay_open):
            line, column = self._cursor.place(top.offset)
            inside = top.tag or "a path"
            allowed = top.close or [repr(end) for end in self._profile.path.end]
            reason = f"the text ends inside {inside} of line {line}, column {column}"
            raise self._cursor.error(reason, allowed)
        self.check_complete(top, self._cursor.pos)
