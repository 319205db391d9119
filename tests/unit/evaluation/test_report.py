"""Figures of a report against answers that were made up, and its bytes against themselves."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vllm_parallel_think.evaluation.answers import AnswerFile, note_exam
from vllm_parallel_think.evaluation.disagreements import disagreements
from vllm_parallel_think.evaluation.errors import ExamError
from vllm_parallel_think.evaluation.report import write_report
from vllm_parallel_think.evaluation.results import results_of

Record = Callable[..., dict[str, Any]]
COMMAND = "python -m vllm_parallel_think report DIR"


def folder_of(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write answers as an exam does."""
    file = AnswerFile(path)
    with file.opened():
        for each in records:
            file.add(each)
    settings = {"command": "python -m vllm_parallel_think evaluate <x>", "methods": {"vote4": {}}}
    note_exam(path, settings)
    return path


@pytest.fixture
def answers(record: Record) -> list[dict[str, Any]]:
    """Return answers of two methods to twelve problems, and some that failed."""
    made = []
    for n in range(12):
        made.append(record(n, "vote4", n % 3 != 0, budget=100))
        made.append(record(n, "vote4", n % 2 != 0, budget=200))
        chain = {"generated": 60, "critical": 60, "forced": 0, "forks": 0, "paths": 0}
        made.append(record(n, "chain", n % 4 != 0, tokens=chain, summary=None))
        made.append(record(n, "chain", n % 6 != 0, tokens=chain, summary=None, budget=200))
        made.append(record(n, "chain", True, concurrency=16, seconds=8.0, tokens=chain))
    made.append(record(12, "chain", status="failed", error="HTTP 500 (5 attempts)"))
    return made


def test_figures_of_made_up_answers(answers: list[dict[str, Any]]) -> None:
    results = results_of(answers, ["vote4"])
    assert results.methods == ["vote4", "chain"] and results.sets == ["gsm8k"]
    rows = {(row.method, row.budget): row for row in results.rows}
    vote, chain = rows["vote4", 100], rows["chain", 100]
    assert vote.accuracy is not None and chain.accuracy is not None
    assert vote.accuracy.value == pytest.approx(8 / 12)
    # The answers at another concurrency are the same answers again.
    assert chain.accuracy.value == pytest.approx(9 / 12)
    assert (chain.asked, chain.answered, chain.seeds) == (13, 12, 1)
    assert (vote.tokens, vote.critical, vote.ratio, vote.eta) == (80, 40, 2, 0.5)
    assert chain.seconds == {1: 2.0, 16: 8.0} and vote.seconds == {1: 2.0}
    assert (vote.parallel_rate, chain.parallel_rate) == (1, 0)
    assert vote.fallbacks == {"max_tokens": 12} and chain.fallbacks == {}
    assert chain.wilson is not None and vote.over_budget == 0
    assert results.failures == {"HTTP 500 (5 attempts)": 1}
    (first, second) = results.pairs
    assert (first.budget, first.first, first.second) == (100, "vote4", "chain")
    assert first.found.difference.value == pytest.approx(-1 / 12)
    wrong = {n for n in range(12) if n % 3 == 0}, {n for n in range(12) if n % 4 == 0}
    assert first.found.first_only == len(wrong[1] - wrong[0])
    assert first.found.second_only == len(wrong[0] - wrong[1])
    assert second.budget == 200


def test_a_failed_request_is_no_wrong_answer(record: Record) -> None:
    made = [record(0), record(1, status="failed", error="x")]
    (row,) = results_of(made).rows
    assert row.accuracy is not None and row.accuracy.value == 1.0
    assert (row.asked, row.answered) == (2, 1)
    (row,) = results_of([record(1, status="failed", error="x")]).rows
    assert row.accuracy is None and row.tokens is None


def test_seeds_of_a_problem_are_averaged(record: Record) -> None:
    made = [record(0, right=seed < 3, seed=seed) for seed in range(4)] + [record(1, right=False)]
    (row,) = results_of(made).rows
    assert row.accuracy is not None
    assert (row.accuracy.value, row.accuracy.num, row.seeds) == (0.375, 2, 4)
    assert row.wilson is None


def test_unknown_critical_paths_stay_unknown(record: Record) -> None:
    tokens = {"generated": 40, "critical": None, "forced": 0, "forks": 1, "paths": 4}
    (row,) = results_of([record(0), record(1, tokens=tokens)]).rows
    assert (row.tokens, row.critical, row.ratio, row.eta) == (60, None, None, None)


def test_the_graders_disagreements_are_counted(record: Record) -> None:
    grade = {"right": True, "plain": False, "found": "1", "by": "math-verify", "note": ""}
    slow = {"right": True, "plain": True, "found": "1", "by": "plain", "note": "timeout"}
    graders = results_of([record(0), record(1, grade=grade), record(2, grade=slow)]).graders
    assert (graders.compared, len(graders.disagreements)) == (2, 1)
    assert graders.undecided == {"timeout": 1}


def test_worst_disagreements_come_first(record: Record) -> None:
    made = [record(0, "a"), record(0, "b", right=False), record(1, "a"), record(1, "b")]
    made += [record(2, "a", seed=seed) for seed in range(2)]
    made += [record(2, "b", right=seed == 0, seed=seed) for seed in range(2)]
    found = disagreements(results_of(made), "gsm8k")
    assert [(each.problem, each.spread) for each in found] == [("gsm8k/0", 1), ("gsm8k/2", 0.5)]


def everything(folder: Path) -> dict[str, bytes]:
    """Return the files of a report."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


WRITE = """
import sys
from pathlib import Path
from vllm_parallel_think.evaluation.report import write_report
write_report([Path(sys.argv[1])], Path(sys.argv[2]), sys.argv[3])
"""


def test_the_same_answers_give_the_same_bytes(
    answers: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_report([folder_of(tmp_path / "a", answers)], tmp_path / "first", COMMAND)
    random.Random(1).shuffle(answers)
    other = folder_of(tmp_path / "b", answers)
    # Another process, another order of sets and dictionaries, another time zone and language.
    changed = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    words = [sys.executable, "-c", WRITE, str(other), str(tmp_path / "second"), COMMAND]
    subprocess.run(words, check=True, env=changed, timeout=120)
    first, second = everything(tmp_path / "first"), everything(tmp_path / "second")
    assert first.keys() == second.keys() and len(first) == 3 + 2 * 4
    for name, content in first.items():
        assert content == second[name], name


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps what a page would load."""

    EMPTY = frozenset({"meta", "img", "source", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_beside_itself(
    answers: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_report([folder_of(tmp_path, answers)], tmp_path, COMMAND)
    page = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and "script" not in tags.tags
    assert len(tags.loads) == 2 * 4
    assert all(each.startswith("data:image/svg+xml;base64,") for each in tags.loads)
    assert "prefers-color-scheme: dark" in page
    # What others wrote is text, and no part of the page.
    assert "What is 2? &lt;b&gt;" in page and "evaluate &lt;x&gt;" in page and "<b>" not in page
    assert page.count(f"<code>{COMMAND}</code>") >= 7


def test_plots_are_pictures_in_two_themes(answers: list[dict[str, Any]], tmp_path: Path) -> None:
    write_report([folder_of(tmp_path, answers)], tmp_path, COMMAND)
    names = {path.stem for path in tmp_path.glob("*.svg")}
    axes = ("tokens", "critical", "seconds-1", "seconds-16")
    assert names == {f"gsm8k-{axis}-{theme}" for axis in axes for theme in ("light", "dark")}
    light, dark = (
        (tmp_path / f"gsm8k-tokens-{theme}.svg").read_text() for theme in ("light", "dark")
    )
    for svg, colours in ((light, ("#0072b2", "#d55e00")), (dark, ("#56b4e9", "#e69f00"))):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert all(colour in svg for colour in colours)
        assert "<dc:date>" not in svg


def test_figures_in_json_and_markdown(answers: list[dict[str, Any]], tmp_path: Path) -> None:
    write_report([folder_of(tmp_path, answers)], tmp_path, COMMAND)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["command"] == COMMAND and figures["versions"]["model"] == ["fake"]
    row = next(r for r in figures["methods"] if (r["method"], r["budget"]) == ("vote4", 100))
    assert row["accuracy"]["value"] == pytest.approx(8 / 12, abs=1e-6) and row["eta"] == 0.5
    assert len(figures["pairs"]) == 2
    text = (tmp_path / "report.md").read_text()
    assert COMMAND in text and "## gsm8k: methods" in text
    assert re.search(
        r"\| vote4 \| 100 \| 66\.7 % \([\d.]+-[\d.]+\) \| 12 x 1 \| 0 \| 80 \| 40", text
    )
    widths = {line.count(" | ") for line in text.partition("methods\n")[2].splitlines()[1:7]}
    assert len(widths) == 1


def test_folders_that_cannot_be_reported(record: Record, tmp_path: Path) -> None:
    with pytest.raises(ExamError, match="has no answers"):
        write_report([tmp_path], tmp_path, COMMAND)
    first = folder_of(tmp_path / "a", [record(0)])
    second = folder_of(tmp_path / "b", [record(0, request="another")])
    with pytest.raises(ExamError, match="report them apart"):
        write_report([first, second], tmp_path, COMMAND)
    third = folder_of(tmp_path / "c", [record(1)])
    write_report([first, third], tmp_path / "d", COMMAND)
    figures = json.loads((tmp_path / "d" / "report.json").read_text())
    assert figures["methods"][0]["answered"] == 2
