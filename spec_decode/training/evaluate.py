"""``evaluate``: rules against each other on problems with answers, in transformers.

One text at a time, so its speed says nothing; accepted lengths and answers are what an engine gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import records
from ..dtypes import Dtype
from ..judge_head import load_head
from ..reference_decoding import speculate
from ..rules import KL, FLy, Judge, Rule, TopNDelta, Typical
from ..tasks.arithmetic import Question, make_problems, read_answer
from ..vocabulary import check_pair
from .generation import load_model, stop_ids


@dataclass(frozen=True)
class Evaluate:
    """Settings of the command.

    Attributes:
        model: Path of the target.
        draft: Path of the draft.
        out: JSONL file, a record a rule and problem.
        judge: A head of ``fit``; without it the judge is left out.
        num: How many problems.
        seed: Which ones; take another than for training.
        drafts: Draft tokens a step.
        max_tokens: Longest answer.
        dtype: What target and draft are loaded in: float32, bfloat16, float16, or auto for their
            files'.

    """

    model: str
    draft: str
    out: Path
    judge: Path | None = None
    num: int = 100
    seed: int = 1
    drafts: int = 4
    max_tokens: int = 40
    dtype: Dtype = "float32"


def rules(judge: Path | None, target: str) -> dict[str, Rule | None]:
    """Return the rules that are compared, by the name in the table."""
    compared: dict[str, Rule | None] = {"standard": None}
    if judge is not None:
        head = load_head(judge, targets=[target])
        compared["judge"] = Judge(head, head.threshold)
        for threshold in (0.3, 0.5, 0.7, 0.9):
            compared[f"judge {threshold}"] = Judge(head, threshold)
    return {
        **compared,
        "top 10, delta 0.6": TopNDelta(10, 0.6),
        "top 5, delta 0.3": TopNDelta(5, 0.3),
        "top-k 3": TopNDelta(3, 1.0),
        "typical": Typical(),
        "KL 0.3": KL(),
        "FLy, window 2": FLy(window=2),
    }


def run(settings: Evaluate) -> None:
    """Evaluate what has no record yet, then print the table."""
    done = records.finished(settings.out)
    problems = make_problems(settings.num, settings.seed)
    compared = rules(settings.judge, settings.model)
    tasks = [(n, p) for p in problems for n in compared if f"{n}/{p.key}" not in done]
    if tasks:
        check_pair(settings.model, settings.draft)
        models = Models.load(settings)
        for name, problem in tqdm(tasks, desc="evaluate", unit="answer"):
            record = _answer(settings, models, compared[name], problem)
            records.append(settings.out, [{"key": f"{name}/{problem.key}", "rule": name, **record}])
    wanted = {problem.key for problem in problems}
    for name in compared:
        found = [
            r
            for r in records.read(settings.out)
            if r["rule"] == name and r["key"].rpartition("/")[2] in wanted
        ]
        print(row(name, found))


@dataclass(frozen=True)
class Models:
    """What answers: two models, their tokenizer, and the tokens that end an answer."""

    target: Any
    draft: Any
    tokenizer: Any
    ends: frozenset[int]

    @classmethod
    def load(cls, settings: Evaluate) -> Models:
        """Load the pair that the settings name."""
        target, tokenizer = load_model(settings.model, settings.dtype)
        draft, _ = load_model(settings.draft, settings.dtype)
        return cls(target, draft, tokenizer, stop_ids(target, tokenizer))


def _answer(
    settings: Evaluate, models: Models, rule: Rule | None, problem: Question
) -> dict[str, Any]:
    trace = speculate(
        models.target,
        models.draft,
        models.tokenizer.encode(problem.question),
        rule=rule,
        num_drafts=settings.drafts,
        max_tokens=settings.max_tokens,
        stop_ids=models.ends,
    )
    text = models.tokenizer.decode(trace.tokens, skip_special_tokens=True)
    return {
        "right": read_answer(text) == problem.answer,
        "tokens": len(trace.tokens),
        "steps": trace.steps,
        "drafts": trace.drafts,
        "kept": trace.kept,
        "lossy": trace.lossy,
    }


def row(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Return a rule's line of the table: length, lossy share, right answers with 95 % interval."""
    total = {k: sum(r[k] for r in found) for k in ("right", "tokens", "steps", "kept", "lossy")}
    low, high = interval(total["right"], len(found))
    length = 1 + total["kept"] / max(1, total["steps"])
    return (
        f"{name:20} length {length:.2f}  lossy {total['lossy'] / max(1, total['tokens']):6.1%}  "
        f"right {total['right'] / max(1, len(found)):.1%} ({low:.1%}-{high:.1%}) of {len(found)}"
    )


def interval(right: int, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a share after Wilson (J. Am. Stat. Assoc. 22, 1927)."""
    if not num:
        return 0.0, 1.0
    z, share = 1.96, right / num
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)
