"""The error of a text that breaks its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class GrammarError(Exception):
    """The first place where a text breaks its grammar.

    Attributes:
        reason: What is wrong, in a few words.
        line: Line of the place, from 1.
        column: Column of the place, from 1.
        found: What stands there.
        allowed: What may stand there.

    """

    def __init__(self, reason: str, line: int, column: int, found: str, allowed: Sequence[str]):
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
