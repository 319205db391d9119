"""``collect``: what the target writes on problems with known answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import records
from .problems import Problem, make_problems, read_answer
from .reading import load_model, stop_ids, write_greedily


@dataclass(frozen=True)
class Collect:
    """Settings of the command.

    Attributes:
        model: Path or name of the model that writes.
        out: JSONL file: key, prompt and text as token ids, the right answer, the one given.
        data: JSONL file of problems (key, question, answer); ``None`` makes arithmetic ones up.
        num: How many problems to make up.
        seed: Which ones.
        max_tokens: Longest answer.
        batch: Problems that are answered at once.

    """

    model: str
    out: Path
    data: Path | None = None
    num: int = 500
    seed: int = 0
    max_tokens: int = 40
    batch: int = 32


def run(settings: Collect) -> None:
    """Answer all problems that have no record yet."""
    done = records.finished(settings.out)
    problems = [p for p in _problems(settings) if p.key not in done]
    if not problems:
        return
    model, tokenizer = load_model(settings.model)
    ends = stop_ids(model, tokenizer)
    with tqdm(total=len(problems), desc="collect", unit="problem") as bar:
        for some in batches(problems, settings.batch):
            prompts = [list(tokenizer.encode(p.question)) for p in some]
            texts = write_greedily(model, prompts, settings.max_tokens, ends)
            rows = zip(some, prompts, texts, strict=True)
            records.append(settings.out, [_record(tokenizer, *row) for row in rows])
            bar.update(len(some))


def _problems(settings: Collect) -> list[Problem]:
    if settings.data is None:
        return make_problems(settings.num, settings.seed)
    try:
        return [
            Problem(str(r["key"]), r["question"], str(r["answer"]))
            for r in records.read(settings.data)
        ]
    except KeyError as error:
        raise ValueError(f"{settings.data}: a problem lacks {error}") from None


def _record(tokenizer: Any, problem: Problem, prompt: list[int], text: list[int]) -> dict[str, Any]:
    given = read_answer(tokenizer.decode(text, skip_special_tokens=True))
    return {
        "key": problem.key,
        "prompt": prompt,
        "text": text,
        "answer": problem.answer,
        "given": given,
    }


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield items in runs of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
