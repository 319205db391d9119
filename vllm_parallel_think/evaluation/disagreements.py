"""Problems on which methods disagree most, with what each of them wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .answers import AnswerRecord
from .results import Results

MOST_PROBLEMS = 10
"""Of a set: a report shall open in a browser."""


@dataclass(frozen=True)
class Disagreement:
    """A problem that some methods have right and others wrong.

    Attributes:
        set_name: Its set.
        problem: Its key.
        budget: The largest budget, of which the answers are.
        spread: Share of right answers of the best method less the worst's.
        shares: Share of right answers, by method.
        answers: The first answer of every method.

    """

    set_name: str
    problem: str
    budget: int
    spread: float
    shares: dict[str, float]
    answers: Sequence[AnswerRecord]


def disagreements(results: Results, set_name: str) -> list[Disagreement]:
    """Return the problems of a set with the largest spread between methods, largest first."""
    answers = [record for record in results.answers if record["set"] == set_name]
    budget = max((record["budget"] for record in answers), default=0)
    by_problem: dict[str, list[AnswerRecord]] = defaultdict(list)
    for record in answers:
        if record["budget"] == budget:
            by_problem[record["problem"]].append(record)
    found = [_one(set_name, key, budget, each, results.methods) for key, each in by_problem.items()]
    found.sort(key=lambda each: (-each.spread, each.problem))
    return [each for each in found if each.spread > 0][:MOST_PROBLEMS]


def _one(
    set_name: str, key: str, budget: int, answers: Sequence[AnswerRecord], methods: Sequence[str]
) -> Disagreement:
    shares, firsts = {}, []
    for method in methods:
        own = sorted((r for r in answers if r["method"] == method), key=lambda r: int(r["seed"]))
        if own:
            shares[method] = fmean(bool(record["grade"]["right"]) for record in own)
            firsts.append(own[0])
    spread = max(shares.values()) - min(shares.values())
    return Disagreement(set_name, key, budget, spread, shares, firsts)
