"""Problem sets in their publishers' forms, from files that tests write."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import pickle
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_parallel_think.evaluation.errors import ExamError
from vllm_parallel_think.evaluation.set_forms import competition_program
from vllm_parallel_think.evaluation.sets import SETS, load_prompts, load_set

GPQA = {
    "Question": "Which?",
    "Correct Answer": "this\n",
    "Incorrect Answer 1": "that",
    "Incorrect Answer 2": "neither",
    "Incorrect Answer 3": "both",
}
PROGRAM: dict[str, Any] = {
    "question_content": "Add.",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1", "output": "1", "testtype": "stdin"}]),
    "private_test_cases": "[]",
    "metadata": "{}",
}
RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "aime24": ({"problem": "p", "answer": "033"}, "033"),
    "aime25": ({"question": "p", "answer": "70"}, "70"),
    "amc23": ({"question": "p", "answer": 27.0}, "27"),
    "math500": ({"problem": "p", "answer": "\\frac{1}{2}", "level": 2}, "\\frac{1}{2}"),
    "gsm8k": ({"question": "p", "answer": "1 + 1 = <<1+1=2>>2\n#### 2,000"}, "2000"),
    "limo": ({"question": "p", "solution": "s", "answer": "5"}, "5"),
    "olympiadbench": ({"question": "p", "final_answer": ["$2n$"]}, "2n"),
    "humaneval": ({"task_id": "t", "prompt": "p", "test": "t", "entry_point": "f"}, ""),
    "livecodebench": (PROGRAM, ""),
}


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records in the form that a file's name says."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        if ".csv" in path.name:
            rows = csv.DictWriter(file, records[0])
            rows.writeheader()
            rows.writerows(records)
        elif ".jsonl" in path.name:
            file.writelines(json.dumps(record) + "\n" for record in records)
        else:
            json.dump(records, file)
    return path


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("file", ["set.json", "set.jsonl", "set.jsonl.gz"])
def test_every_set_reads_its_form(tmp_path: Path, name: str, file: str) -> None:
    record, answer = RECORDS[name]
    path = written(tmp_path / file, [record, record])
    loaded = load_set(f"{name}:{path}")
    assert [problem.key for problem in loaded.problems] == [f"{name}/0", f"{name}/1"]
    assert loaded.problems[0].answer == answer
    asked = loaded.asked(loaded.problems[0])
    assert loaded.problems[0].question in asked and "{question}" not in asked


def test_all_sets_are_covered() -> None:
    made = {name for name, each in SETS.items() if each.made}
    assert set(SETS) == {*RECORDS, "gpqa-diamond"} | made
    for name, each in SETS.items():
        assert (each.hub is None) == (name in made)


def test_sets_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        if path == "GAIR/LIMO":
            raise ConnectionError("no network")
        return [RECORDS["gsm8k"][0]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(load_set("gsm8k").problems) == 1
    with pytest.raises(ExamError, match=r"no network.*give limo:FILE"):
        load_set("limo")
    assert asked == [("openai/gsm8k", "main", "test"), ("GAIR/LIMO", None, "train")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExamError, match=r"\[hub\].*or give gsm8k:FILE"):
        load_set("gsm8k")


@pytest.mark.parametrize("file", ["gpqa_diamond.csv", "gpqa.jsonl"])
def test_options_are_shuffled_the_same_way_every_time(tmp_path: Path, file: str) -> None:
    path = written(tmp_path / file, [GPQA] * 60)
    first, second = (load_set(f"gpqa-diamond:{path}").problems for _ in range(2))
    assert first == second
    for problem in first:
        assert f"{problem.answer}) this" in problem.question.split("\n")
    letters = [problem.answer for problem in first]
    assert all(5 <= letters.count(letter) <= 30 for letter in "ABCD")


def test_a_part_of_a_set_keeps_its_numbers(tmp_path: Path) -> None:
    records = [{"problem": f"p{n}", "answer": str(n), "level": 1 + n % 5} for n in range(20)]
    path = written(tmp_path / "math.json", records)
    loaded = load_set(f"math500:{path}", num=3, where={"level": ["2", "3"]})
    assert [problem.key for problem in loaded.problems] == ["math500/1", "math500/2", "math500/6"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"problem": 1}', "expected a list of objects"),
        ("[1]", "expected a list of objects"),
        ("[", "set.json"),
        ('[{"problem": "p"}]', "record 1: not in the form"),
        ("[]", "no problem is left"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(ExamError, match=says):
        load_set(f"math500:{tmp_path / 'set.json'}")


def test_private_tests_of_programs_are_unpacked() -> None:
    hidden = json.dumps([{"input": "2", "output": "2", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    problem = competition_program("k", {**PROGRAM, "private_test_cases": packed})
    assert [test["input"] for test in problem.code["tests"]] == ["1", "2"]


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1 / 0",)


def test_a_pickle_of_somebodys_runs_nothing() -> None:
    packed = base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.eval"):
        competition_program("k", {**PROGRAM, "private_test_cases": packed})


@pytest.mark.parametrize("name", ["orders", "chained-orders"])
def test_synthetic_problems_have_right_answers(name: str) -> None:
    loaded = load_set(name, num=50)
    assert loaded == load_set(name, num=50) and len({p.question for p in loaded.problems}) == 50
    for problem in loaded.problems:
        assert worked_out(problem.question) == int(problem.answer)


def worked_out(question: str) -> int:
    """Work a synthetic problem out from its words."""
    totals: dict[str, int] = {}
    for sentence in question.split(". ")[:-1] + question.split(". ")[-1:]:
        words = sentence.replace(",", "").split()
        if "pays" not in words or sentence.startswith(("What", "How")):
            continue
        numbers = [int(word) for word in words if word.isdecimal()]
        if "than" in words:
            totals[words[0]] = totals[words[words.index("than") + 1]] + numbers[0]
        else:
            totals[words[0]] = sum(numbers)
    if "largest" in question:
        return max(totals.values())
    return totals[question.split()[-2]]


def test_prompts_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "prompts.toml"
    file.write_text('gsm8k = "Q: {question}\\nA:"')
    prompts = load_prompts(file)
    path = written(tmp_path / "g.jsonl", [RECORDS["gsm8k"][0]])
    loaded = load_set(f"gsm8k:{path}", prompt=prompts["gsm8k"])
    assert loaded.asked(loaded.problems[0]) == "Q: p\nA:"
    assert load_prompts(None) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [("gsm9k = 'x'", "gsm9k"), ("gsm8k = 1", "must be a text"), ("x", "prompts.toml")],
)
def test_prompts_that_are_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "prompts.toml"
    file.write_text(text)
    with pytest.raises(ExamError, match=says):
        load_prompts(file)


def test_a_prompt_without_its_question(tmp_path: Path) -> None:
    path = written(tmp_path / "g.jsonl", [RECORDS["gsm8k"][0]])
    with pytest.raises(ExamError, match=r"no \{question\}"):
        load_set(f"gsm8k:{path}", prompt="Answer.")
