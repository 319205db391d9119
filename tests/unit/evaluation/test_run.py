"""The exam against a server that answers, fails, is cut off, or says nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_server import Body, Failure, FakeServer, Reply, completion
from vllm_parallel_think.__main__ import main
from vllm_parallel_think.evaluation.answers import AnswerFile
from vllm_parallel_think.evaluation.client import ExamClient, RequestFailed, Retries
from vllm_parallel_think.evaluation.errors import ExamError
from vllm_parallel_think.evaluation.grading import Grader
from vllm_parallel_think.evaluation.methods import load_methods
from vllm_parallel_think.evaluation.run import Exam, Outcome, valid_grammar
from vllm_parallel_think.evaluation.schedule import Closing, ExamTask, waves
from vllm_parallel_think.evaluation.sets import LoadedSet

QUICK = Retries(most=3, first_wait=0.01)
TIMEOUT = 20.0
"""Long enough for a machine that has other things to do."""
SILENCE = 1.5
"""After how long tests take a server that says nothing for one that will not."""


def number_in(body: Body) -> str:
    """Return the number that a question of the tests asks for."""
    found = re.search(r"What is (\d+)", body["messages"][0]["content"])
    assert found is not None
    return found[1]


def right(body: Body, before: int) -> Reply:
    """Answer as it should be."""
    return completion(f"It is \\boxed{{{number_in(body)}}}.")


def planned(
    five: LoadedSet, methods: Sequence[str] = ("chain",), concurrency: int = 1, **others: Any
) -> list[list[ExamTask]]:
    """Return the waves of a small exam."""
    closing = others.get("closing", Closing())
    seeds = others.get("seeds", 1)
    return list(waves([five], load_methods(methods), [100], seeds, [concurrency], closing))


def examine(
    url: str,
    folder: Path,
    tasks: Sequence[Sequence[ExamTask]],
    retries: Retries = QUICK,
    timeout: float = TIMEOUT,
) -> Outcome:
    """Run an exam with plain grading."""

    async def run() -> Outcome:
        async with ExamClient(url, timeout, retries) as client:
            file = AnswerFile(folder)
            with file.opened():
                exam = Exam(client, "fake", file, Grader(None), {"server": "0.0"}, give_up=4)
                return await exam.run(tasks)

    return asyncio.run(run())


def test_answers_are_graded_and_kept(five: LoadedSet, tmp_path: Path) -> None:
    with FakeServer(right).running() as server:
        assert examine(server.url, tmp_path, planned(five)) == Outcome(5, 0)
    records = AnswerFile(tmp_path).read()
    assert [record["key"] for record in records] == [f"gsm8k/{n}|chain|100|0|1" for n in range(5)]
    assert all(record["grade"]["right"] and record["seconds"] > 0 for record in records)
    assert records[0]["tokens"]["generated"] == 10 and records[0]["versions"] == {"server": "0.0"}
    body = server.requests[0]
    assert body["max_tokens"] == 100 and body["vllm_xargs"] == {"parallel_think": "off"}


ONCE: dict[str, Failure] = {
    "429": Failure(429, {"Retry-After": "0.05"}),
    "429 with a date": Failure(429, {"Retry-After": "Sun, 29 Nov 2026 12:00:00 GMT"}),
    "500": Failure(500, text="boom"),
    "503": Failure(503),
    "cut before the first byte": Failure(cut=0),
    "cut in the middle": Failure(cut=40),
    "no JSON": Failure(text="<html>"),
    "no choices": Failure(text='{"choices": []}'),
    "no message": Failure(text='{"choices": [{}], "usage": {"completion_tokens": 1}}'),
    "never a word": Failure(silent=4 * SILENCE),
    "a byte now and then": Failure(drip=4 * SILENCE),
}


def patience(name: str) -> float:
    """Return how long to wait for a response."""
    return SILENCE if ONCE[name].silent or ONCE[name].drip else TIMEOUT


@pytest.mark.parametrize("name", ONCE)
def test_what_fails_once_is_asked_again(five: LoadedSet, tmp_path: Path, name: str) -> None:
    def answer(body: Body, before: int) -> Reply | Failure:
        return ONCE[name] if number_in(body) == "2" and not before else right(body, before)

    with FakeServer(answer).running() as server:
        outcome = examine(server.url, tmp_path, planned(five), timeout=patience(name))
    assert outcome == Outcome(5, 0)
    records = AnswerFile(tmp_path).read()
    assert [record["attempts"] for record in records] == [1, 1, 2, 1, 1]
    # What was waited for in vain is no part of a method's time.
    assert all(r["grade"]["right"] and r["seconds"] < patience(name) for r in records)


@pytest.mark.parametrize("name", ONCE)
def test_retries_have_a_limit(five: LoadedSet, tmp_path: Path, name: str) -> None:
    def answer(body: Body, before: int) -> Reply | Failure:
        return ONCE[name] if number_in(body) == "2" else right(body, before)

    with FakeServer(answer).running() as server:
        tasks = planned(five)
        outcome = examine(server.url, tmp_path, tasks, Retries(1, 0.01), patience(name))
        assert outcome == Outcome(5, 1)
        assert len(server.requests) == 6
    failed = [record for record in AnswerFile(tmp_path).read() if record["status"] == "failed"]
    assert [record["problem"] for record in failed] == ["gsm8k/2"]
    assert "(2 attempts)" in failed[0]["error"] and "grade" not in failed[0]


def test_a_refusal_is_final_until_the_next_run(five: LoadedSet, tmp_path: Path) -> None:
    refused = [True]

    def answer(body: Body, before: int) -> Reply | Failure:
        if refused[0] and number_in(body) == "3":
            return Failure(400, text='{"error": {"message": "pt_num_paths must be at most 8"}}')
        return right(body, before)

    with FakeServer(answer).running() as server:
        assert examine(server.url, tmp_path, planned(five)) == Outcome(5, 1)
        assert len(server.requests) == 5
        (failed,) = [r for r in AnswerFile(tmp_path).read() if r["status"] == "failed"]
        assert "at most 8" in failed["error"]
        refused[0] = False
        assert examine(server.url, tmp_path, planned(five)) == Outcome(1, 0)
    records = AnswerFile(tmp_path).read()
    assert len(records) == 5 and all(record["status"] == "ok" for record in records)


def test_a_server_that_is_gone_ends_the_exam(five: LoadedSet, tmp_path: Path) -> None:
    with FakeServer(lambda body, before: Failure(400)).running() as server:
        with pytest.raises(ExamError, match="4 requests in a row failed"):
            examine(server.url, tmp_path, planned(five))
        assert len(server.requests) == 4
    with FakeServer(right).running() as server:
        assert examine(server.url, tmp_path, planned(five)) == Outcome(5, 0)


def test_a_response_without_usage_is_no_answer(five: LoadedSet, tmp_path: Path) -> None:
    def answer(body: Body, before: int) -> Reply:
        return {**right(body, before), "usage": None} if number_in(body) == "0" else right(body, 0)

    with FakeServer(answer).running() as server:
        assert examine(server.url, tmp_path, planned(five)) == Outcome(5, 1)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_than_allowed_are_in_flight(
    five: LoadedSet, tmp_path: Path, concurrency: int
) -> None:
    everyone = threading.Barrier(concurrency)

    def answer(body: Body, before: int) -> Reply:
        # The first ones wait until as many as may are there.
        if int(number_in(body)) < concurrency:
            everyone.wait(5)
        time.sleep(0.01)
        return right(body, before)

    with FakeServer(answer).running() as server:
        examine(server.url, tmp_path, planned(five, concurrency=concurrency))
        assert server.most_in_flight == concurrency


def test_client_side_majority(five: LoadedSet, tmp_path: Path) -> None:
    def answer(body: Body, before: int) -> Reply:
        good = f"\\boxed{{{number_in(body)}}}"
        return completion("\\boxed{99}", f"first {good}", "\\boxed{98}", f"second {good}")

    with FakeServer(answer).running() as server:
        examine(server.url, tmp_path, planned(five, ["sc4"]))
    records = AnswerFile(tmp_path).read()
    assert all(r["grade"]["right"] and r["text"].startswith("first") for r in records)
    assert len(records[0]["texts"]) == 4 and records[0]["tokens"]["generated"] == 40


def test_a_cut_answer_is_closed_the_same_way_for_all(five: LoadedSet, tmp_path: Path) -> None:
    def answer(body: Body, before: int) -> Reply:
        if body["messages"][-1]["role"] == "assistant":
            return completion(f"{number_in(body)}}}.", tokens=4)
        if number_in(body) == "1":
            return completion("\\boxed{1} and", cut=True)
        return completion("Let us see", cut=True)

    closing = Closing(" So it is \\boxed{", 16)
    with FakeServer(answer).running() as server:
        examine(server.url, tmp_path, planned(five, ["vote4"], closing=closing))
        asked = [body for body in server.requests if len(body["messages"]) == 2]
    records = AnswerFile(tmp_path).read()
    assert [record["closed"] for record in records] == [True, False, True, True, True]
    assert all(record["grade"]["right"] and record["cut"] for record in records)
    assert records[0]["text"] == "Let us see So it is \\boxed{0}."
    assert [record["tokens"]["generated"] for record in records[:2]] == [14, 10]
    assert len(asked) == 4 and asked[0]["continue_final_message"] is True
    assert asked[0]["add_generation_prompt"] is False and asked[0]["max_tokens"] == 16
    assert asked[0]["vllm_xargs"] == {"parallel_think": "off"}
    assert asked[0]["messages"][1]["content"] == "Let us see So it is \\boxed{"


def test_a_cut_answer_counts_by_what_stands_in_it(five: LoadedSet, tmp_path: Path) -> None:
    def answer(body: Body, before: int) -> Reply:
        number = number_in(body)
        text = f"\\boxed{{{number}}} but" if number in "12" else "Let us see, 77"
        return completion(text, cut=True)

    with FakeServer(answer).running() as server:
        examine(server.url, tmp_path, planned(five))
    grades = [record["grade"]["right"] for record in AnswerFile(tmp_path).read()]
    assert grades == [False, True, True, False, False]


def test_changed_methods_need_another_folder(five: LoadedSet, tmp_path: Path) -> None:
    with FakeServer(right).running() as server:
        examine(server.url, tmp_path, planned(five))
        other = planned(five, closing=Closing("So: "))
        with pytest.raises(ExamError, match="choose another --out"):
            examine(server.url, tmp_path, other)
        assert examine(server.url, tmp_path, planned(five, seeds=2)) == Outcome(5, 0)


def test_two_exams_do_not_share_a_folder(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path)
    with file.opened():
        with pytest.raises(ExamError, match="another exam is writing"):
            with AnswerFile(tmp_path).opened():
                pass
    with file.opened():
        pass


def test_the_servers_errors_are_short() -> None:
    with FakeServer(lambda body, before: Failure(400, text="x" * 10_000)).running() as server:

        async def ask() -> None:
            async with ExamClient(server.url, TIMEOUT, QUICK) as client:
                assert await client.model() == "fake" and await client.version() == "0.0"
                await client.chat({})

        with pytest.raises(RequestFailed) as refused:
            asyncio.run(ask())
    assert len(str(refused.value)) < 400


def test_waits_grow_and_have_an_end() -> None:
    retries = Retries(9, 1.0)
    assert 0.5 <= retries.wait(0) <= 1.5 and 4 <= retries.wait(3) <= 12
    assert retries.wait(30) == 60.0 and retries.wait(0, asked=7.0) == 7.0
    assert retries.wait(0, asked=1e6) == 60.0


GOOD = (
    "<Think>\n<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n</Goal>"
    "\n<Path>\n1: x\n</Path>\n<Path>\n2: y\n</Path>\n<Conclusion>\nz\n</Conclusion>\n</Parallel>"
    "\n</Think>"
)


def test_grammars_are_checked_where_a_model_writes_them() -> None:
    assert valid_grammar({"profile": "multiverse"}, GOOD) is True
    assert valid_grammar({"profile": "multiverse"}, GOOD.replace("<Conclusion>", "")) is False
    assert valid_grammar({"profile": "skeleton"}, GOOD) is None
    assert valid_grammar(None, GOOD) is None


@pytest.fixture
def exam_file(tmp_path: Path) -> Path:
    """Return problems in GSM8K's form, all of which 1 answers."""
    file = tmp_path / "set.jsonl"
    lines = [json.dumps({"question": f"{n} / {n}?", "answer": "#### 1"}) for n in range(1, 41)]
    file.write_text("\n".join(lines))
    return file


def arguments(url: str, exam_file: Path, out: Path, *others: str) -> list[str]:
    """Return the words of the command."""
    words = ["evaluate", "--base-url", url, "--sets", f"gsm8k:{exam_file}", "--budgets", "64"]
    return [*words, "--methods", "chain,vote4", "--out", str(out), *others]


def wait_for(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something has happened."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def test_killed_in_the_middle_it_goes_on_to_the_question(exam_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answers = out / "answers.jsonl"

    def slow(body: Body, before: int) -> Reply:
        time.sleep(0.02)
        return completion("\\boxed{1}")

    with FakeServer(slow).running() as server:
        command = [sys.executable, "-m", "vllm_parallel_think"]
        words = arguments(server.url, exam_file, out)
        for so_far in (5, 20):
            process = subprocess.Popen(command + words, stderr=subprocess.DEVNULL)
            wait_for(lambda at=so_far: answers.exists() and answers.read_bytes().count(b"\n") > at)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        # As if it had been killed while it wrote a line.
        with answers.open("ab") as file:
            file.write(b'{"key": "gsm8k/39|chain')
        kept = answers.read_bytes().count(b"\n")
        asked = len(server.requests)
        assert kept < 80
        done = subprocess.run(command + words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) - asked == 80 - kept
    assert f"{80 - kept} asked, 0 failed" in done.stdout
    assert f"{kept}/80" in done.stderr, "progress starts where it was"
    records = AnswerFile(out).read()
    assert len(records) == 80 == answers.read_bytes().count(b"\n")
    assert all(record["grade"]["right"] for record in records)
    (exam,) = (out / "exams.jsonl").read_text().splitlines()
    assert json.loads(exam)["command"].startswith("python -m vllm_parallel_think evaluate --base")


def test_failed_requests_show_in_the_exit_code(exam_file: Path, tmp_path: Path) -> None:
    def answer(body: Body, before: int) -> Reply | Failure:
        return Failure(500) if "7 / 7" in body["messages"][0]["content"] else completion("1")

    with FakeServer(answer).running() as server:
        words = arguments(server.url, exam_file, tmp_path / "out", "--retries", "0")
        assert main([*words, "--num", "10"]) == 3
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "2 x `HTTP 500 (1 attempts)`" in page and "| chain | 64 | 100.0 % (" in page


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--methods", "nothing"], "'nothing' is none of"),
        (["--sets", "gsm9k"], "'gsm9k' is none of"),
        (["--sets", "gsm8k:none.jsonl"], "none.jsonl"),
        (["--sets", "humaneval:none.jsonl"], "none.jsonl"),
        (["--where", "level=1"], "level"),
        (["--sets", "orders,orders"], "each set once"),
        (["--base-url", "http://127.0.0.1:9"], "names no model"),
    ],
)
def test_wrong_settings_are_named(
    exam_file: Path,
    tmp_path: Path,
    change: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = arguments("http://127.0.0.1:9", exam_file, tmp_path / "out", *change)
    assert main(words) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()
