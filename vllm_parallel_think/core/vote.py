"""Majority vote over independent answers (self-consistency, arXiv 2203.11171)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_BOXED = r"\boxed{"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Vote:
    """What several answers to one question say.

    Attributes:
        winner: Index of the first text that gives the most frequent answer; 0 if no text gives one.
        answer: That answer, or ``None``.
        counts: How many texts gave each answer, most frequent first.

    """

    winner: int
    answer: str | None
    counts: dict[str, int]


def vote(texts: Sequence[str], pattern: re.Pattern[str] | None = None) -> Vote:
    """Return the majority of the answers that texts end with; the earliest one wins a tie."""
    answers = [extract(text, pattern) for text in texts]
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Vote(0, None, {})
    # Counters keep the order of first appearance among equals.
    ranked = counts.most_common()
    answer = ranked[0][0]
    return Vote(answers.index(answer), answer, dict(ranked))


def extract(text: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """Return a text's final answer: the operator's pattern, ``\\boxed{...}``, or the last number.

    Args:
        text: A whole answer.
        pattern: Chosen by the operator; its last match counts, by its first group if it has one.

    """
    if pattern is not None and (found := list(pattern.finditer(text))):
        last = found[-1]
        return normal(last[1] if pattern.groups else last[0])
    if (boxed := _last_boxed(text)) is not None:
        return normal(boxed)
    numbers = _NUMBER.findall(text)
    return normal(numbers[-1]) if numbers else None


def normal(answer: str | None) -> str | None:
    """Write equal answers alike: no outer white space, no thousands separators, 3 for 3.0."""
    answer = (answer or "").strip()
    if _NUMBER.fullmatch(answer):
        answer = answer.replace(",", "")
        if "." in answer:
            answer = answer.rstrip("0").rstrip(".")
    return answer or None


def _last_boxed(text: str) -> str | None:
    """Return what the last complete ``\\boxed{...}`` holds, with braces inside it balanced."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        depth = 1
        for index in range(start + len(_BOXED), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if not depth:
                return text[start + len(_BOXED) : index]
        end = start
    return None
