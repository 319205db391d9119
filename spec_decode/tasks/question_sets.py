"""Well-known question sets as problems: from the model hub, or from a file in the same form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import records
from .arithmetic import SHOTS, Question

Record = Mapping[str, Any]


@dataclass(frozen=True)
class QuestionSet:
    """Where a set lies on the hub, and how one of its records reads.

    Attributes:
        path: Name of the data set.
        config: Its configuration, or ``None``.
        split: Its part.
        read: Returns question and answer of a record; the answer of an open question is empty.

    """

    path: str
    config: str | None
    split: str
    read: Callable[[Record], tuple[str, str]]


def _gsm8k(record: Record) -> tuple[str, str]:
    """arXiv 2110.14168: the number behind ``####`` is the answer."""
    answer = record["answer"].rpartition("####")[2].strip().replace(",", "")
    return f"{SHOTS}Q: {record['question']}\nA:", answer


def _alpaca(record: Record) -> tuple[str, str]:
    """Stanford Alpaca's instructions: open questions, for collecting texts and hand labels."""
    given = f"\n\nInput: {record['input']}" if record["input"] else ""
    return f"Instruction: {record['instruction']}{given}\n\nResponse:", ""


def _arc(record: Record) -> tuple[str, str]:
    """arXiv 1803.05457: the letter of the right choice is the answer."""
    choices = record["choices"]
    lines = [f"{n}. {t}" for n, t in zip(choices["label"], choices["text"], strict=True)]
    question = "\n".join([f"Q: {record['question']}", *lines])
    return f'{question}\nEnd with "Answer: " and the letter.\nA:', record["answerKey"]


SETS = {
    "gsm8k": QuestionSet("openai/gsm8k", "main", "train", _gsm8k),
    "alpaca": QuestionSet("tatsu-lab/alpaca", None, "train", _alpaca),
    "arc": QuestionSet("allenai/ai2_arc", "ARC-Challenge", "train", _arc),
}


def load_problems(data: str, form: str | None = None) -> list[Question]:
    """Return the problems of a file, or of a set on the hub.

    Args:
        data: Path of a JSONL file, or a name of :data:`SETS`, which is downloaded.
        form: Name of the set in whose form a file's records are; ``None`` for records with key,
            question and answer.

    Raises:
        ValueError: There is no such file or set, a record lacks a field, or ``datasets`` is not
            installed.

    """
    if data in SETS:
        return list(_read(data, data, _from_hub(SETS[data])))
    if not Path(data).exists():
        raise ValueError(f"{data}: no such file, and no set of {', '.join(SETS)}")
    found = records.read(Path(data))
    if form is not None:
        if form not in SETS:
            raise ValueError(f"form must be one of {', '.join(SETS)}, got {form!r}")
        return list(_read(data, form, found))
    try:
        return [Question(str(r["key"]), r["question"], str(r["answer"])) for r in found]
    except KeyError as error:
        raise ValueError(f"{data}: a problem lacks {error}; or name its form") from None


def _read(data: str, name: str, found: Iterable[Record]) -> Iterator[Question]:
    for number, record in enumerate(found):
        try:
            question, answer = SETS[name].read(record)
        except (KeyError, TypeError, AttributeError) as error:
            where = f"{data}, record {number + 1}"
            raise ValueError(f"{where}: not in the form of {name}: {error}") from None
        yield Question(f"{name}-{number}", question, answer)


def _from_hub(chosen: QuestionSet) -> Iterable[Record]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{chosen.path} comes from the hub: pip install 'vllm-parallel-think[hub]', or name a "
            "JSONL file of its records and their form"
        ) from None
    found: Iterable[Record] = load_dataset(chosen.path, chosen.config, split=chosen.split)
    return found
