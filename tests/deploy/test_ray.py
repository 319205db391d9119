"""Two replicas on Ray Serve, one killed under load; a batch that is interrupted and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("ray", reason="no Ray: make test-deploy")

from deploy.ray.batch import finished, read_lines
from deploy.ray.cluster import CONFIG, ROOT, Cluster, request_body
from tests.deploy.on_ray import started
from tests.support.server import environment, wait_until

QUESTIONS = [f"How do I {what}?" for what in ("stay healthy", "learn a language", "plan a trip")]
LOAD = 8


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ray Serve with two replicas."""
    with started(model, tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster


@dataclass(frozen=True)
class Seen:
    """What a client saw of a stream: how it ended, its text so far, and who answered."""

    state: str
    text: str
    replica: str = ""


def stream(url: str, question: str, first: threading.Event | None = None) -> Seen:
    """Return how a streamed request ended: `done`, `refused` or `cut`."""
    text = replica = ""
    body = request_body(question, stream=True, max_tokens=500)
    body["vllm_xargs"] = {"pt_path_tokens": 120, "pt_max_paths": 3}
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=200, trust_env=False
        ) as response:
            replica = response.headers.get("x-replica", "")
            if response.status_code != 200:
                return Seen("refused", response.read().decode(), replica)
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return Seen("done", text, replica)
                if line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "choices" not in chunk:
                        return Seen("cut", text, replica)
                    for choice in chunk["choices"]:
                        text += choice["delta"].get("content") or ""
                    if text and first is not None:
                        first.set()
    except httpx.HTTPError:
        pass
    return Seen("cut", text, replica)


def test_a_killed_replica_loses_only_its_own_requests(cluster: Cluster) -> None:
    """Every answer is whole and right, or ends with an error; both replicas serve afterwards."""
    expected = {question: stream(cluster.url, question).text for question in QUESTIONS}
    before = set(cluster.replicas())
    assert len(before) == 2
    flowing = [threading.Event() for _ in range(LOAD)]
    asked = [QUESTIONS[index % len(QUESTIONS)] for index in range(LOAD)]
    with ThreadPoolExecutor(LOAD) as pool:
        futures = [
            pool.submit(stream, cluster.url, question, event)
            for question, event in zip(asked, flowing, strict=True)
        ]
        wait_until(lambda: sum(e.is_set() for e in flowing) >= LOAD // 2, "streams flow", 120)
        groups = {pid: cluster.metric(pid, "vllm_pt_active_groups") for pid in before}
        victim = max(before, key=lambda pid: groups[pid])
        engines = psutil.Process(victim).children(recursive=True)
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in futures]
    states = Counter(seen.state for seen in answers)
    print(f"kill of a replica: {LOAD} streams, {dict(states)}, groups {sorted(groups.values())}")
    lost = {seen.replica for seen in answers if seen.state != "done" and seen.replica}
    assert len(lost) == 1, "the kill hit nothing, or more than one replica"
    for question, seen in zip(asked, answers, strict=True):
        if seen.state == "done":
            assert seen.text == expected[question]
        else:
            assert expected[question].startswith(seen.text), "what was sent stays valid"
    after = [stream(cluster.url, question) for question in QUESTIONS]
    assert [seen.text for seen in after] == [expected[question] for question in QUESTIONS]
    assert all(seen.state == "done" and seen.replica not in lost for seen in after)
    wait_until(lambda: len(cluster.replicas()) == 2, "a new replica", 200)
    assert victim not in cluster.replicas() and before & set(cluster.replicas())
    assert engines and not any(engine.is_running() for engine in engines)


def _batch(model: Path, source: Path, target: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "deploy.ray.batch", "--config", str(CONFIG), "--batch", "1"),
        *("--model", str(model), "--input", str(source), "--output", str(target)),
    ]


def test_an_interrupted_batch_goes_on(model: Path, tmp_path: Path) -> None:
    """What was answered is kept and not asked again; every id is answered once."""
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    body = request_body("")
    lines: list[dict[str, Any]] = [
        {
            "id": index,
            "messages": [{"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}],
            "vllm_xargs": body["vllm_xargs"],
            "sampling": {"temperature": 0, "max_tokens": 120},
        }
        for index in range(6)
    ]
    lines[4]["vllm_xargs"] = {"pt_max_paths": 1000}  # refused: an error of its own line alone
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    variables = environment(PYTHONPATH=str(ROOT), RAY_USAGE_STATS_ENABLED="0")
    command = _batch(model, source, target)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=variables, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 240
        while not (target.exists() and target.read_text().count("\n") >= 1):
            assert process.poll() is None and time.monotonic() < deadline, (
                tmp_path / "log"
            ).read_text()[-3000:]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    before = target.read_text()
    assert 1 <= before.count("\n") < len(lines), "the batch was not interrupted in the middle"
    with target.open("a") as file:
        file.write('{"id": 5, "te')  # a line that the interruption cut
    done = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(lines) - before.count(chr(10))} answers added" in done.stdout
    after = target.read_text()
    assert after.startswith(before)
    answers = {answer["id"]: answer for answer in map(json.loads, after.splitlines())}
    assert sorted(answers) == list(range(6)) and after.count("\n") == 6
    assert "pt_max_paths" in answers.pop(4)["error"]
    assert all(answer["parallel_think"]["forks"] for answer in answers.values())
    assert answers[0]["text"] == answers[3]["text"]


def test_the_input_is_checked(tmp_path: Path) -> None:
    """An error names the line; a half line of an output is cut off."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "messages": []}\n{"id": 1, "messages": []}\n')
    with pytest.raises(ValueError, match="line 2: the id 1 came before"):
        list(read_lines(source))
    source.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="line 1: needs the keys"):
        list(read_lines(source))
    target = tmp_path / "out.jsonl"
    target.write_text('{"id": 1}\n{"id": ')
    assert finished(target) == {1}
    assert target.read_text() == '{"id": 1}\n'
