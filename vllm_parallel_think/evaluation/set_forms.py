"""How the publishers of problem sets write a record."""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class ExamProblem:
    """A problem of a set.

    Attributes:
        key: ``set/number``; the number counts the set's records from 0, whatever is chosen of them.
        question: What is asked, without the set's prompt.
        answer: What is right; empty where tests decide.
        code: What the tests of a program need.

    """

    key: str
    question: str
    answer: str
    code: Mapping[str, Any] = field(default_factory=dict)


ReadRecord = Callable[[str, Record], ExamProblem]
"""Makes a problem of its key and its record."""


def worked(key: str, record: Record) -> ExamProblem:
    """Read GSM8K's form: the number behind ``####`` is the answer."""
    answer = record["answer"].rpartition("####")[2].strip().replace(",", "")
    return ExamProblem(key, record["question"], answer)


def mathematics(key: str, record: Record) -> ExamProblem:
    """Read the form most sets of mathematics share, under the names that its fields go by."""
    return ExamProblem(
        key,
        _first(record, "problem", "question", "Problem"),
        _plain(_first(record, "answer", "final_answer", "Answer", "expected_answer")),
    )


def multiple_choice(key: str, record: Record) -> ExamProblem:
    """Read GPQA's form; the options are shuffled, the same way for the same key in every run."""
    right = record["Correct Answer"].strip()
    options = [right, *(record[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    order = list(range(len(options)))
    random.Random(f"options:{key}").shuffle(order)
    lines = [f"{LETTERS[place]}) {options[index]}" for place, index in enumerate(order)]
    question = "\n".join([record["Question"].strip(), "", *lines])
    return ExamProblem(key, question, LETTERS[order.index(0)])


def completed_function(key: str, record: Record) -> ExamProblem:
    """Read HumanEval's form."""
    code = {name: record[name] for name in ("prompt", "test", "entry_point")}
    return ExamProblem(key, record["prompt"], "", code)


def competition_program(key: str, record: Record) -> ExamProblem:
    """Read LiveCodeBench's form: programs that read standard input, or a class with a method."""
    question = record["question_content"]
    if starter := record.get("starter_code"):
        question += f"\n\nStart with this code:\n```python\n{starter}\n```"
    tests = _tests(record["public_test_cases"]) + _tests(record.get("private_test_cases", "[]"))
    metadata = record.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    return ExamProblem(key, question, "", {"tests": tests, "method": name})


class _NothingUnpickler(pickle.Unpickler):
    """Reads plain values and refuses to look up anything that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a test may hold no {module}.{name}")


def _tests(text: str | Sequence[Record]) -> list[Record]:
    """Return tests, which are published as JSON, or as JSON in a pickle, compressed, in base 64."""
    if not isinstance(text, str):
        return list(text)
    try:
        found: list[Record] = json.loads(text)
    except json.JSONDecodeError:
        packed = zlib.decompress(base64.b64decode(text))
        found = json.loads(_NothingUnpickler(io.BytesIO(packed)).load())
    return found


def _first(record: Record, *names: str) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise KeyError(" or ".join(names))


def _plain(answer: object) -> str:
    """Return an answer as text: the first of a list, 27 for 27.0, no ``$`` around it."""
    if isinstance(answer, list):
        answer = answer[0]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str(answer).strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" else text
