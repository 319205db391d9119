"""Majority vote over independent answers (self-consistency, arXiv 2203.11171)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

VOTE_TOKENS = 8192
"""Last tokens of a text in which its final answer is looked for."""

PATTERN_CHARACTERS = 4096
"""Last characters of those that the operator's pattern sees: some cost the square of a length."""

SHOWN_CHARACTERS = 200
"""Of an answer in the counts, which go to the client with every output."""

_BRACE = re.compile(r"\\boxed\{|[{}]")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Vote:
    """What several answers to one question say.

    Attributes:
        winner: Index of the first text that gives the most frequent answer; 0 if no text gives one.
        answer: That answer, or ``None``; like those in ``counts`` cut where it is very long.
        counts: How many texts gave each answer, most frequent first.

    """

    winner: int
    answer: str | None
    counts: dict[str, int]


def vote(texts: Sequence[str], pattern: re.Pattern[str] | None = None) -> Vote:
    """Return the majority of the answers that texts end with; the earliest one wins a tie."""
    return majority([extract(text, pattern) for text in texts])


def majority(answers: Sequence[str | None]) -> Vote:
    """Return the most frequent of some answers; the earliest one wins a tie."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Vote(0, None, {})
    # Counters keep the order of first appearance among equals.
    ranked = counts.most_common()
    answer = ranked[0][0]
    shown = Counter[str]()
    for other, count in ranked:
        shown[_shown(other)] += count
    return Vote(answers.index(answer), _shown(answer), dict(shown))


def extract(text: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """Return a text's final answer: the operator's pattern, ``\\boxed{...}``, or the last number.

    Args:
        text: How an answer ends; the cost is linear in it, but for the pattern.
        pattern: Chosen by the operator; its last match counts, by its first group if it has one. It
            sees the last :data:`PATTERN_CHARACTERS` only.

    """
    if pattern is not None and (last := _last(pattern, text[-PATTERN_CHARACTERS:])):
        return normal(last[1] if pattern.groups else last[0])
    if (boxed := _last_boxed(text)) is not None:
        return normal(boxed)
    number = _last(_NUMBER, text)
    return normal(number[0]) if number else None


def normal(answer: str | None) -> str | None:
    """Write equal answers alike: no outer white space, no thousands separators, 3 for 3.0."""
    answer = (answer or "").strip()
    if _NUMBER.fullmatch(answer):
        answer = answer.replace(",", "")
        if "." in answer:
            answer = answer.rstrip("0").rstrip(".")
    return answer or None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007
        pass
    return last


def _last_boxed(text: str) -> str | None:
    """Return what the last complete ``\\boxed{...}`` holds, with braces inside it balanced."""
    opened: list[int] = []
    start = end = -1
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(-1)
        elif brace[0] != "}":
            opened.append(brace.end())
        elif opened and (left := opened.pop()) > start:
            start, end = left, brace.start()
    return text[start:end] if start >= 0 else None


def _shown(answer: str) -> str:
    return answer if len(answer) <= SHOWN_CHARACTERS else answer[:SHOWN_CHARACTERS] + "…"
