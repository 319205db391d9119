"""From answers to figures: a row for each set, method and budget, and each pair of methods."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from .answers import AnswerRecord, succeeded
from .statistics import Estimate, PairedDifference, bootstrap, compare, holm, means_of, wilson


@dataclass(frozen=True)
class MethodRow:
    """A method on a set, with a budget.

    Attributes:
        set_name: The set.
        method: The method.
        budget: Budget of all generated tokens.
        accuracy: Mean over problems of the mean over seeds, with its BCa interval.
        asked: Answers that were asked for.
        answered: Answers that came; the others are not in any figure.
        seeds: Most answers to one problem.
        wilson: Interval of the share of right answers, where every problem has one answer.
        tokens: Mean of all generated tokens.
        critical: Mean tokens of the critical path; ``None`` where the server does not tell.
        seconds: Mean seconds of an answer, by concurrency.
        ratio: All generated tokens over those of the critical paths.
        parallel_rate: Share of answers with a fork.
        cut: Share of answers that the budget cut.
        closed: Share of answers that the exam's closing text ended.
        over_budget: Share of answers that took more tokens than their budget.
        valid_grammar: Share of texts that keep their grammar; ``None`` where the engine writes it.
        fallbacks: Forks that were not made, by reason.

    """

    set_name: str
    method: str
    budget: int
    accuracy: Estimate | None
    asked: int
    answered: int
    seeds: int
    wilson: tuple[float, float] | None
    tokens: float | None
    critical: float | None
    seconds: Mapping[int, float]
    ratio: float | None
    parallel_rate: float | None
    cut: float | None
    closed: float | None
    over_budget: float | None
    valid_grammar: float | None
    fallbacks: Mapping[str, int]

    @property
    def eta(self) -> float | None:
        """Share of the tokens that are not on the critical path (ThreadWeaver's figure)."""
        return None if self.ratio is None else 1 - 1 / self.ratio


@dataclass(frozen=True)
class PairRow:
    """Two methods on the same problems of a set, with the same budget.

    Attributes:
        set_name: The set.
        budget: The budget of both.
        first: One method.
        second: The other.
        found: How they compare.
        p_flips_holm: The sign-flip test's p, corrected for all pairs of the set and budget.
        p_mcnemar_holm: McNemar's p, corrected in the same way.

    """

    set_name: str
    budget: int
    first: str
    second: str
    found: PairedDifference
    p_flips_holm: float
    p_mcnemar_holm: float


@dataclass(frozen=True)
class Graders:
    """How math-verify and a plain comparison of texts get on.

    Attributes:
        compared: Answers that both graded.
        disagreements: Answers on which they disagree; math-verify's word counts.
        undecided: Answers that math-verify did not come to an end with, by reason; the plain
            comparison's word counts.

    """

    compared: int
    disagreements: Sequence[AnswerRecord]
    undecided: Mapping[str, int]


@dataclass(frozen=True)
class Results:
    """Everything a report says.

    Attributes:
        rows: Methods, by set and budget.
        pairs: Pairs of methods.
        graders: How far grading can be trusted.
        failures: Requests without an answer, by reason.
        methods: All methods, in the order of tables and colours.
        answers: What was counted: an answer for each set, problem, method, budget and seed.

    """

    rows: Sequence[MethodRow]
    pairs: Sequence[PairRow]
    graders: Graders
    failures: Mapping[str, int]
    methods: Sequence[str]
    answers: Sequence[AnswerRecord]

    @property
    def sets(self) -> list[str]:
        """The sets, by name."""
        return sorted({row.set_name for row in self.rows})


def results_of(records: Iterable[AnswerRecord], order: Sequence[str] = ()) -> Results:
    """Return the figures of some answers.

    Args:
        records: Lines of one or several folders.
        order: Methods in the order they were asked for; others follow by name.

    """
    everything = sorted(records, key=lambda record: str(record["key"]))
    cells: dict[tuple[str, int, str], list[AnswerRecord]] = defaultdict(list)
    for record in everything:
        cells[record["set"], record["budget"], record["method"]].append(record)
    known = {record["method"] for record in everything}
    named = [name for name in dict.fromkeys(order) if name in known]
    methods = [*named, *sorted(known - set(named))]
    ordered = sorted(cells, key=lambda cell: (cell[0], methods.index(cell[2]), cell[1]))
    answers = [each for cell in ordered for each in counted(cells[cell])]
    failed = [record for record in everything if not succeeded(record)]
    return Results(
        rows=[_row(cell, cells[cell]) for cell in ordered],
        pairs=_pairs(cells, methods),
        graders=_graders(answers),
        failures=dict(sorted(Counter(str(record["error"]) for record in failed).items())),
        methods=methods,
        answers=answers,
    )


def counted(records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """Return the answers that count for accuracy: of several concurrencies the lowest one's.

    The same seed at another concurrency is the same answer again, and no further evidence.
    """
    found: dict[tuple[str, int], AnswerRecord] = {}
    for record in sorted(records, key=lambda record: int(record["concurrency"])):
        if succeeded(record):
            found.setdefault((record["problem"], record["seed"]), record)
    return [found[key] for key in sorted(found)]


def scores_of(answers: Iterable[AnswerRecord]) -> dict[str, dict[int, bool]]:
    """Return what is right, by problem and seed."""
    scores: dict[str, dict[int, bool]] = defaultdict(dict)
    for record in answers:
        scores[record["problem"]][record["seed"]] = bool(record["grade"]["right"])
    return dict(scores)


def _row(cell: tuple[str, int, str], records: Sequence[AnswerRecord]) -> MethodRow:
    set_name, budget, method = cell
    answers = counted(records)
    scores = scores_of(answers)
    means = means_of(scores)
    seeds = max((len(each) for each in scores.values()), default=0)
    tokens = [record["tokens"] for record in answers]
    known = [each for each in tokens if each["critical"] is not None]
    all_known = bool(tokens) and len(known) == len(tokens)
    chains = sum(each["critical"] for each in known)
    grammar = [r["valid_grammar"] for r in answers if r["valid_grammar"] is not None]
    single = seeds == 1 and bool(means)
    return MethodRow(
        set_name=set_name,
        method=method,
        budget=budget,
        accuracy=bootstrap(list(means.values())) if means else None,
        asked=len({(record["problem"], record["seed"]) for record in records}),
        answered=len(answers),
        seeds=seeds,
        wilson=wilson(round(sum(means.values())), len(means)) if single else None,
        tokens=_mean(tokens, lambda each: each["generated"]),
        critical=_mean(known, lambda each: each["critical"]) if all_known else None,
        seconds=_seconds(records),
        ratio=sum(each["generated"] for each in known) / chains if all_known and chains else None,
        parallel_rate=_mean(tokens, lambda each: each["forks"] > 0),
        cut=_mean(answers, lambda each: each["cut"]),
        closed=_mean(answers, lambda each: each["closed"]),
        over_budget=_mean(tokens, lambda each: each["generated"] > budget),
        valid_grammar=_mean(grammar, float),
        fallbacks=_fallbacks(answers),
    )


def _mean(items: Sequence[Any], value: Callable[[Any], float]) -> float | None:
    return fmean(float(value(each)) for each in items) if items else None


def _seconds(records: Sequence[AnswerRecord]) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for record in records:
        if succeeded(record):
            found[record["concurrency"]].append(record["seconds"])
    return {concurrency: fmean(found[concurrency]) for concurrency in sorted(found)}


def _fallbacks(answers: Sequence[AnswerRecord]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for record in answers:
        found.update((record["summary"] or {}).get("fallbacks", {}))
    return dict(sorted(found.items()))


def _pairs(
    cells: Mapping[tuple[str, int, str], Sequence[AnswerRecord]], methods: Sequence[str]
) -> list[PairRow]:
    rows = []
    for set_name, budget in sorted({cell[:2] for cell in cells}):
        scores = {
            method: scores_of(counted(cells[set_name, budget, method]))
            for method in methods
            if (set_name, budget, method) in cells
        }
        found = [
            (first, second, pair)
            for first, second in combinations(scores, 2)
            if (pair := compare(scores[first], scores[second])) is not None
        ]
        flips = holm([pair.p_flips for _, _, pair in found])
        mcnemars = holm([pair.p_mcnemar for _, _, pair in found])
        rows += [
            PairRow(set_name, budget, first, second, pair, p_flips, p_mcnemar)
            for (first, second, pair), p_flips, p_mcnemar in zip(
                found, flips, mcnemars, strict=True
            )
        ]
    return rows


def _graders(answers: Sequence[AnswerRecord]) -> Graders:
    by_both = [record for record in answers if record["grade"]["by"] == "math-verify"]
    notes = Counter(record["grade"]["note"] for record in answers if record["grade"]["note"])
    return Graders(
        compared=len(by_both),
        disagreements=[r for r in by_both if r["grade"]["plain"] != r["grade"]["right"]],
        undecided=dict(sorted(notes.items())),
    )
