"""Where a writer's step ends: a blank line after a sentence, outside open code and math."""

from __future__ import annotations

_SENTENCE_ENDS = frozenset(".?!:;…。？！：；")
_CLOSERS = frozenset("\"')]}*_`”’»）】")
"""May stand between a sentence's end and the blank line."""

_FENCE = "```"
_MATH = "$$"
_BLANKS = frozenset(" \t\r")


class StepText:
    """Follows the text that one writer samples in one step; keeps no more than a few characters."""

    def __init__(self) -> None:
        self._run = ""
        self._last = ""
        self._newlines = 0
        self._in_code = False
        self._math = ""

    def feed(self, piece: str) -> bool:
        """Take a token's text; return whether the step ends with it."""
        for char in piece:
            self._feed(char)
        is_open = self._in_code or bool(self._math)
        return self._newlines >= 2 and self._last in _SENTENCE_ENDS and not is_open

    def _feed(self, char: str) -> None:
        if char == "\n":
            self._newlines += 1
            self._run = ""
            return
        if char in _BLANKS:
            self._run = ""
            return
        self._newlines = 0
        self._run = self._run + char if self._continues(char) else char
        if char not in _CLOSERS:
            self._last = char
        if self._run == _FENCE and not self._math:
            self._in_code = not self._in_code
            self._close(self._in_code)
        elif not self._in_code and self._run in (_MATH, "\\[", "\\]"):
            self._toggle_math(self._run)

    def _continues(self, char: str) -> bool:
        run = self._run + char
        return any(mark.startswith(run) for mark in (_FENCE, _MATH, "\\[", "\\]"))

    def _toggle_math(self, mark: str) -> None:
        if not self._math and mark != "\\]":
            self._math = "\\]" if mark == "\\[" else mark
        elif mark == self._math:
            self._math = ""
            self._close(False)
        self._run = ""

    def _close(self, is_open: bool) -> None:
        """A block of code or math that is complete ends a sentence."""
        self._run = ""
        if not is_open:
            self._last = "."
