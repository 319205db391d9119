"""``collect``: what models write on problems with known answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import records
from ..dtypes import Dtype
from ..judge_head import model_name
from ..tasks.arithmetic import Question, make_problems, read_answer
from ..tasks.question_sets import load_problems
from .generation import load_model, stop_ids, write_greedily


@dataclass(frozen=True)
class Collect:
    """Settings of the command.

    Attributes:
        model: Path or name of the model that writes. Another model may go on in the same file.
        out: JSONL file: key, model, prompt and text as token ids, the right answer, the one given.
        data: JSONL file of problems (key, question, answer), or gsm8k, alpaca or arc from the hub;
            ``None`` makes arithmetic ones up.
        form: Set in whose form the records of a file are: gsm8k, alpaca or arc.
        num: How many problems to make up, or to take at most.
        seed: Which ones.
        max_tokens: Longest answer.
        batch: Problems that are answered at once.
        dtype: What the model is loaded in: float32, bfloat16, float16, or auto for its files'.

    """

    model: str
    out: Path
    data: str | None = None
    form: str | None = None
    num: int = 500
    seed: int = 0
    max_tokens: int = 40
    batch: int = 32
    dtype: Dtype = "float32"


def run(settings: Collect) -> None:
    """Answer all problems that have no record yet."""
    done = records.finished(settings.out)
    name = model_name(settings.model)
    problems = [p for p in _problems(settings) if f"{name}/{p.key}" not in done]
    if not problems:
        return
    model, tokenizer = load_model(settings.model, settings.dtype)
    ends = stop_ids(model, tokenizer)
    with tqdm(total=len(problems), desc="collect", unit="problem") as bar:
        for some in batches(problems, settings.batch):
            prompts = [list(tokenizer.encode(p.question)) for p in some]
            texts = write_greedily(model, prompts, settings.max_tokens, ends)
            rows = zip(some, prompts, texts, strict=True)
            records.append(settings.out, [_record(tokenizer, name, *row) for row in rows])
            bar.update(len(some))


def _problems(settings: Collect) -> list[Question]:
    if settings.data is None:
        return make_problems(settings.num, settings.seed)
    return load_problems(settings.data, settings.form)[: settings.num]


def texts_of(path: Path, model: str, ends: Collection[int] = ()) -> list[dict[str, Any]]:
    """Return the records that a model has written.

    Args:
        path: The file.
        model: Path or name of the model.
        ends: Tokens that only end a text.

    Raises:
        ValueError: There are none, or one goes on behind its end.

    """
    name = model_name(model)
    found = [record for record in records.read(path) if record["model"] == name]
    if not found:
        raise ValueError(f"{path} has no text of {name}: run `python -m spec_decode collect`")
    for record in found:
        if not set(ends).isdisjoint(record["text"][:-1]):
            raise ValueError(
                f"{path}, {record['key']}: the text goes on behind the end of its line, into "
                "questions of its own; delete the file and run `python -m spec_decode collect`"
            )
    return found


def _record(
    tokenizer: Any, model: str, problem: Question, prompt: list[int], text: list[int]
) -> dict[str, Any]:
    given = read_answer(tokenizer.decode(text, skip_special_tokens=True))
    return {
        "key": f"{model}/{problem.key}",
        "model": model,
        "prompt": prompt,
        "text": text,
        "answer": problem.answer,
        "given": given,
    }


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield items in runs of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
