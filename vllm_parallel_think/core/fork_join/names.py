"""Reading path names out of a text that grows, at a cost that does not grow with it."""

from __future__ import annotations

import re

from ..branch_graph import PathName

NAME_SPAN = 256
"""Characters in which a name, its title and what surrounds them must stand, unless they are on one
line: what was read before is looked at again no further back than this."""

READ_EVERY = 4096
"""Characters that are collected before names are looked for in them: the most, with a span before
them, that one search of the regular expression sees."""


class NameReader:
    """Finds the distinct names of a block, in order of appearance.

    A name is settled once its line is complete; until then its title may still grow.
    """

    def __init__(self, pattern: re.Pattern[str], most: int) -> None:
        """Start without a block.

        Args:
            pattern: Group 1 is a name, group 2 (if any) its title.
            most: Names that a block may have; one more is found, so that it is seen to be too long.

        """
        self._pattern = pattern
        self._most = most
        self.stop()

    def start(self, text: str) -> None:
        """Begin a block with the text that is there of it."""
        self.stop()
        self.reads = True
        self.feed(text)

    def stop(self) -> None:
        """Forget the block: what comes next is none."""
        self.reads = False
        """Whether there is a block."""
        self._settled: dict[str, PathName] = {}
        self._text = ""
        self._pos = 0
        self._new: list[str] = []
        self._num_new = 0

    def feed(self, piece: str) -> None:
        """Take more of the block's text."""
        if not self.reads or len(self._settled) > self._most:
            return
        self._new.append(piece)
        self._num_new += len(piece)
        if self._num_new >= READ_EVERY:
            self.read()

    def read(self, *, whole_lines: bool = False) -> tuple[PathName, ...]:
        """Return the names so far; of an incomplete last line too, unless told otherwise."""
        if not self.reads:
            return ()
        text = self._text + "".join(self._new)
        self._new, self._num_new = [], 0
        settled_to = text.rfind("\n") + 1
        end = settled_to if whole_lines else len(text)
        settled, growing = self._settled, dict[str, PathName]()
        for match in self._pattern.finditer(text, self._pos, end):
            if len(settled) + len(growing) > self._most:
                break
            name = self._named(match)
            if match.end() <= settled_to or match.start() < end - NAME_SPAN:
                self._pos = match.end()
                if name is not None:
                    settled.setdefault(name.name, name)
            elif name is not None and name.name not in settled:
                growing.setdefault(name.name, name)
        self._pos = max(self._pos, end - NAME_SPAN)
        # What stands before the place to go on from is kept for a pattern that looks back.
        cut = max(0, self._pos - NAME_SPAN)
        self._text, self._pos = text[cut:], self._pos - cut
        return (*settled.values(), *growing.values())

    def _named(self, match: re.Match[str]) -> PathName | None:
        """Return the path that a match names; a title that is only marks names none."""
        titled = self._pattern.groups >= 2
        title = (match[2] or "").replace("*", "").strip() if titled else ""
        return PathName(match[1], title) if match[1] and (title or not titled) else None
