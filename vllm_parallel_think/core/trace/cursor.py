"""A text, where its reader stands in it, and the error of one that breaks its grammar."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .wording import loose


class GrammarError(Exception):
    """The first place where a text breaks its grammar.

    Attributes:
        reason: What is wrong, in a few words.
        line: Line of the place, from 1.
        column: Column of the place, from 1.
        found: What stands there.
        allowed: What may stand there.

    """

    def __init__(
        self, reason: str, line: int, column: int, found: str, allowed: Sequence[str]
    ) -> None:
        self.reason, self.line, self.column = reason, line, column
        self.found, self.allowed = found, tuple(allowed)
        super().__init__(
            f"line {line}, column {column}: {reason}\n"
            f"  found:   {found}\n  allowed: {' or '.join(self.allowed)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the error as plain values."""
        keys = ("reason", "line", "column", "found", "allowed")
        return {key: getattr(self, key) for key in keys}


class Cursor:
    """Steps through a text from left to right.

    Attributes:
        text: The text.
        pos: Offset of what is read next.
        notes: Places where the text differs from what the engine would write, without harm.

    """

    def __init__(self, text: str, lexer: re.Pattern[str]) -> None:
        self.text = text
        self.pos = 0
        self.notes: list[str] = []
        self._lexer = lexer

    def take(self, forced: str) -> bool:
        """Step over forced text if it is there; white space may differ, which is noted."""
        if self.text.startswith(forced, self.pos):
            self.pos += len(forced)
            return True
        found = re.compile(loose(forced)).match(self.text, self.pos)
        if found is None:
            return False
        self.note(f"the engine writes {forced!r} here, not {found[0]!r}", self.pos)
        self.pos = found.end()
        return True

    def next_piece(self, *stops: int | None) -> str:
        """Step over the next tag, or the text up to it, or up to a stop before that."""
        found = self._lexer.search(self.text, self.pos)
        end = len(self.text) if found is None else found.start() or found.end()
        if found is not None and found.start() == self.pos:
            end = found.end()
        end = min([end, *(stop for stop in stops if stop is not None and self.pos < stop)])
        piece = self.text[self.pos : end]
        self.pos = end
        return piece

    def first_end(self, ends: Sequence[str], start: int) -> int | None:
        """Return where the next tag that ends the branch is complete, be it part of another tag."""
        found = ((tag, self.text.find(tag, max(start, self.pos - len(tag) + 1))) for tag in ends)
        return min((at + len(tag) for tag, at in found if at >= 0), default=None)

    def check_nothing_behind(self) -> None:
        """Note white space after the tag that ends the answer; refuse anything else."""
        rest = self.text[self.pos :]
        if rest.strip():
            raise self.error("text behind the end of the answer", ["end of text"])
        if rest:
            self.note(f"the engine ends the answer here, not with {rest!r}", self.pos)

    def note(self, what: str, offset: int) -> None:
        """Note where the text differs from what the engine would write."""
        line, column = self.place(offset)
        self.notes.append(f"line {line}, column {column}: {what}")

    def place(self, offset: int) -> tuple[int, int]:
        """Return line and column of an offset, from 1."""
        before = self.text[:offset]
        return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1

    def error(self, reason: str, allowed: Sequence[str], offset: int | None = None) -> GrammarError:
        """Return an error about what stands at an offset, by default where the reader is."""
        offset = self.pos if offset is None else offset
        rest = self.text[offset:].lstrip()
        offset = len(self.text) - len(rest)
        tag = self._lexer.match(rest)
        found = tag[0] if tag is not None else rest.split("\n")[0][:30]
        line, column = self.place(offset)
        return GrammarError(reason, line, column, repr(found) if found else "end of text", allowed)
