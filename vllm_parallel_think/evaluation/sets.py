"""Problem sets: from a local file in the publisher's own form, or from the hub."""

from __future__ import annotations

import csv
import gzip
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import set_forms, synthetic
from .errors import ExamError
from .set_forms import ExamProblem, ReadRecord, Record

Kind = Literal["math", "choice", "function", "program"]

MATH_PROMPT = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)
CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think "
    "step by step before answering.\n\n{question}"
)
FUNCTION_PROMPT = (
    "Complete the following Python function. Answer with the whole function in one code block.\n\n"
    "```python\n{question}\n```"
)
PROGRAM_PROMPT = (
    "Write a Python program that solves the following problem. Unless code to start with is given, "
    "it reads standard input and writes standard output. Answer with the whole program in one code "
    "block.\n\n{question}"
)
PROMPTS: Mapping[Kind, str] = {
    "math": MATH_PROMPT,
    "choice": CHOICE_PROMPT,
    "function": FUNCTION_PROMPT,
    "program": PROGRAM_PROMPT,
}


@dataclass(frozen=True)
class ProblemSet:
    """A problem set.

    Attributes:
        kind: How its answers are graded.
        read: Makes a problem of one of its records.
        hub: Name on the hub, configuration and split; ``None`` where it is not there.
        made: Makes the records of a set that a program writes.
        licence_note: What its authors ask of those who hold it.

    """

    kind: Kind
    read: ReadRecord
    hub: tuple[str, str | None, str] | None = None
    made: Callable[[], Iterable[Record]] | None = None
    licence_note: str = ""


SETS: Mapping[str, ProblemSet] = {
    "aime24": ProblemSet("math", set_forms.mathematics, ("HuggingFaceH4/aime_2024", None, "train")),
    "aime25": ProblemSet("math", set_forms.mathematics, ("math-ai/aime25", None, "test")),
    "amc23": ProblemSet("math", set_forms.mathematics, ("math-ai/amc23", None, "test")),
    "math500": ProblemSet("math", set_forms.mathematics, ("HuggingFaceH4/MATH-500", None, "test")),
    "gsm8k": ProblemSet("math", set_forms.worked, ("openai/gsm8k", "main", "test")),
    "limo": ProblemSet("math", set_forms.mathematics, ("GAIR/LIMO", None, "train")),
    "olympiadbench": ProblemSet(
        "math", set_forms.mathematics, ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")
    ),
    "gpqa-diamond": ProblemSet(
        "choice",
        set_forms.multiple_choice,
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        licence_note="its authors ask not to publish its questions in plain text",
    ),
    "humaneval": ProblemSet(
        "function", set_forms.completed_function, ("openai/openai_humaneval", None, "test")
    ),
    "livecodebench": ProblemSet(
        "program",
        set_forms.competition_program,
        ("livecodebench/code_generation_lite", None, "test"),
    ),
    "orders": ProblemSet("math", set_forms.mathematics, made=synthetic.orders),
    "chained-orders": ProblemSet("math", set_forms.mathematics, made=synthetic.chained_orders),
}


@dataclass(frozen=True)
class LoadedSet:
    """The problems that an exam asks of a set.

    Attributes:
        name: Name of the set.
        kind: How its answers are graded.
        prompt: Words around a question, with ``{question}`` where it goes.
        problems: The chosen ones, in the set's order.

    """

    name: str
    kind: Kind
    prompt: str
    problems: tuple[ExamProblem, ...]

    def asked(self, problem: ExamProblem) -> str:
        """Return the prompt of a problem."""
        return self.prompt.replace("{question}", problem.question)


def load_set(
    given: str,
    *,
    num: int | None = None,
    where: Mapping[str, Sequence[str]] | None = None,
    prompt: str | None = None,
) -> LoadedSet:
    """Return a set.

    Args:
        given: ``name`` for the hub, or ``name:FILE`` for a JSON, JSONL or CSV file of its records,
            also with ``.gz`` behind it.
        num: How many of its first problems, after ``where``; ``None`` for all.
        where: Values that fields of a record may have, as text, such as levels.
        prompt: Another prompt than the set's.

    Raises:
        ExamError: There is no such set or file, or a record is not in its form.

    """
    name, _, file = given.partition(":")
    if name not in SETS:
        raise ExamError(f"--sets: {name!r} is none of {', '.join(SETS)}")
    chosen = SETS[name]
    if prompt is not None and "{question}" not in prompt:
        raise ExamError(f"--prompts: the prompt of {name} has no {{question}}")
    records: Iterable[Record]
    if file:
        records = _from_file(Path(file))
    elif chosen.made is not None:
        records = chosen.made()
    else:
        records = _from_hub(name, chosen)
    problems = _problems(name, chosen, records, where or {})
    if not problems:
        raise ExamError(f"{given}: no problem is left of it")
    return LoadedSet(name, chosen.kind, prompt or PROMPTS[chosen.kind], tuple(problems[:num]))


def _problems(
    name: str, chosen: ProblemSet, records: Iterable[Record], where: Mapping[str, Sequence[str]]
) -> list[ExamProblem]:
    problems = []
    for number, record in enumerate(records):
        try:
            if all(str(record[key]) in values for key, values in where.items()):
                problems.append(chosen.read(f"{name}/{number}", record))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            message = f"{name}, record {number + 1}: not in the form of its publisher: {error!r}"
            raise ExamError(message) from None
    return problems


def _from_file(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            if name.endswith(".csv"):
                return list(csv.DictReader(file))
            text = file.read()
        if name.endswith(".jsonl"):
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            records = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExamError(f"{path}: {error}") from None
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise ExamError(f"{path}: expected a list of objects, or one object a line in .jsonl")
    return records


def _from_hub(name: str, chosen: ProblemSet) -> Iterable[Record]:
    if chosen.hub is None:
        raise ExamError(f"{name} is not on the hub: give {name}:FILE")
    path, config, split = chosen.hub
    try:
        from datasets import load_dataset
    except ImportError:
        raise ExamError(
            f"{name} comes from the hub: pip install 'vllm-parallel-think[hub]', or give "
            f"{name}:FILE with the records of {path}"
        ) from None
    try:
        records: Iterable[Record] = load_dataset(path, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExamError(
            f"{name}: {path} did not come from the hub ({error}); give {name}:FILE with its records"
        ) from None
    return records


def load_prompts(file: Path | None) -> dict[str, str]:
    """Return other prompts of sets, by name, from a TOML file.

    Raises:
        ExamError: The file is not usable, or names no set.

    """
    if file is None:
        return {}
    try:
        prompts = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ExamError(f"--prompts: {file}: {error}") from None
    for name, prompt in prompts.items():
        if name not in SETS:
            raise ExamError(f"--prompts: {name!r} is none of {', '.join(SETS)}")
        if not isinstance(prompt, str):
            raise ExamError(f"--prompts: the prompt of {name} must be a text")
    return prompts
