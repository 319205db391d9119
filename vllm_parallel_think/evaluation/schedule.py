"""What an exam asks, and in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .methods import Method
from .set_forms import ExamProblem
from .sets import LoadedSet

ROUNDS = 4
"""Answers of one method in a wave, in units of the concurrency: its end is then a small part."""


@dataclass(frozen=True)
class Closing:
    """What ends an answer that its budget cut before it named a result, the same for all methods.

    Attributes:
        text: Words that are put behind it; empty for none.
        max_tokens: Tokens for the result. They are taken out of the budget beforehand.

    """

    text: str = ""
    max_tokens: int = 16

    def left_of(self, budget: int, num_choices: int) -> int:
        """Return the budget that remains for the answer itself."""
        return max(1, budget - self.max_tokens * num_choices) if self.text else budget


@dataclass(frozen=True)
class ExamTask:
    """One answer to be had.

    Attributes:
        problems: The set it belongs to.
        problem: What is asked.
        method: How.
        budget: Of all generated tokens.
        seed: Which of several answers, from 0.
        concurrency: Requests in flight beside it, itself included.
        closing: What ends it if the budget does.

    """

    problems: LoadedSet
    problem: ExamProblem
    method: Method
    budget: int
    seed: int
    concurrency: int
    closing: Closing = Closing()

    @property
    def key(self) -> str:
        """What tells the answer apart from all others of a folder."""
        parts = (self.problem.key, self.method.name, self.budget, self.seed, self.concurrency)
        return "|".join(map(str, parts))

    def body(self, model: str) -> dict[str, Any]:
        """Return the body of its request."""
        budget = self.closing.left_of(self.budget, self.method.num_choices)
        prompt = self.problems.asked(self.problem)
        return self.method.body(model, prompt, budget, self.seed)

    def fingerprint(self, model: str) -> str:
        """Return a short hash of everything that decides its answer but chance."""
        what = [self.body(model), self.closing.text, self.closing.max_tokens, self.problem.answer]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def waves(
    sets: Sequence[LoadedSet],
    methods: Sequence[Method],
    budgets: Sequence[int],
    num_seeds: int,
    concurrencies: Sequence[int],
    closing: Closing,
) -> Iterator[list[ExamTask]]:
    """Yield tasks that may run at the same time, one method a wave.

    At a concurrency of one a wave is one answer: every method answers a problem before the next
    one comes, and none is always the first, so that a machine that gets slower or faster does so
    for all. At more a wave is some problems of one method, so that its seconds are those of a
    server that has nothing else to do.
    """
    for concurrency in concurrencies:
        size = 1 if concurrency == 1 else ROUNDS * concurrency
        for seed in range(num_seeds):
            for budget in budgets:
                for problems in sets:
                    for first in range(0, len(problems.problems), size):
                        chunk = problems.problems[first : first + size]
                        shift = (first // size) % len(methods)
                        for method in [*methods[shift:], *methods[:shift]]:
                            if seed == 0 or not method.is_greedy:
                                yield [
                                    ExamTask(
                                        problems, each, method, budget, seed, concurrency, closing
                                    )
                                    for each in chunk
                                ]
