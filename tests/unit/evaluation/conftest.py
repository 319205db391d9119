"""Small sets and answers for tests of the exam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_parallel_think.evaluation.set_forms import ExamProblem
from vllm_parallel_think.evaluation.sets import LoadedSet


@pytest.fixture
def five() -> LoadedSet:
    """Return five problems; the answer to each is its number."""
    problems = tuple(ExamProblem(f"gsm8k/{n}", f"What is {n}?", str(n)) for n in range(5))
    return LoadedSet("gsm8k", "math", "{question} Box it.", problems)


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """Return a maker of answer records."""

    def make(
        problem: int, method: str = "chain", right: bool = True, **changes: Any
    ) -> dict[str, Any]:
        made: dict[str, Any] = {
            "set": "gsm8k",
            "problem": f"gsm8k/{problem}",
            "method": method,
            "budget": 100,
            "seed": 0,
            "concurrency": 1,
            "request": f"{method} {problem}",
            "versions": {"model": "fake", "server": None},
            "question": f"What is {problem}? <b>",
            "gold": str(problem),
            "status": "ok",
            "text": f"\\boxed{{{problem}}} & more",
            "cut": False,
            "closed": False,
            "tokens": {"generated": 80, "critical": 40, "forced": 0, "forks": 1, "paths": 2},
            "summary": {"profile": "skeleton", "fallbacks": {"max_tokens": 1}},
            "valid_grammar": None,
            "seconds": 2.0,
            "attempts": 1,
            "grade": {
                "right": right,
                "plain": right,
                "found": str(problem),
                "by": "math-verify",
                "note": "",
            },
            **changes,
        }
        parts = ("problem", "method", "budget", "seed", "concurrency")
        made["key"] = "|".join(str(made[part]) for part in parts)
        return made

    return make
