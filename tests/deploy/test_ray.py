"""Ray: replicas behind one endpoint, one of them killed under load; batches that go on."""

from __future__ import annotations

import json
import os
import signal
import socket
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

from tests.serve.server import environment, wait_until

ray = pytest.importorskip("ray", reason="pip install '.[ray]'")

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
TOPICS = ("staying healthy", "learning a language", "saving money", "cooking", "sleeping well")


def question(number: int) -> dict[str, Any]:
    """A parallel request whose greedy answer is always the same."""
    text = f"How do I get better at {TOPICS[number % len(TOPICS)]}?"
    return {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 160,
        "temperature": 0,
        "stream": True,
        "vllm_xargs": {"pt_path_tokens": 24, "pt_max_paths": 3},
    }


@dataclass(frozen=True)
class Outcome:
    """What one client saw: which replica, the text so far, and whether it came to its end."""

    replica: str
    text: str
    ended: bool
    error: str


def stream(url: str, number: int, started: threading.Event | None = None) -> Outcome:
    """Ask one question, and read until the end or until the connection breaks."""
    replica, text, error, ended = "", "", "", False
    try:
        with httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json=question(number),
            timeout=120,
            trust_env=False,
        ) as response:
            replica = response.headers.get("x-replica", "")
            if response.status_code != 200:
                return Outcome(replica, "", False, f"HTTP {response.status_code}")
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    ended = True
                elif data.startswith("{"):
                    found = json.loads(data)
                    if "error" in found:
                        error = str(found["error"])
                        continue
                    text += "".join(c["delta"].get("content") or "" for c in found["choices"])
                    if text and started is not None:
                        started.set()
    except httpx.HTTPError as broken:
        error = repr(broken)
    return Outcome(replica, text, ended and not error, error)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """The demo's application: two replicas on this machine's CPU."""
    from ray import serve

    from deploy.ray import demo

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in [n for n in os.environ if n.startswith(("VLLM_", "OMP_")) and n != "VLLM_PT_CACHE"]:
        del os.environ[name]
    found = demo.start(demo.load(str(model), port), seconds=420)
    yield found
    serve.shutdown()
    ray.shutdown()


def replicas() -> set[int]:
    """Return the process of every replica that lives."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if " ".join(process.info["cmdline"] or ()).startswith("ray::ServeReplica:parallel-think")
    }


def test_both_replicas_answer_the_same(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda i: stream(url, i), range(15)))
    assert all(outcome.ended for outcome in outcomes), outcomes
    assert len({outcome.replica for outcome in outcomes}) == 2
    for number in range(len(TOPICS)):
        assert len({o.text for o in outcomes[number :: len(TOPICS)]}) == 1


def test_wrong_requests_are_refused_as_by_vllm(url: str) -> None:
    body = {**question(0), "vllm_xargs": {"pt_max_paths": 99}}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False)
    assert response.status_code == 400
    assert "pt_max_paths must be a whole number" in response.json()["error"]["message"]
    assert "vllm_pt_requests_total" in httpx.get(f"{url}/metrics", trust_env=False).text


def test_a_killed_replica_loses_only_its_own_requests(url: str) -> None:
    """Kill -9 in the middle of streams under load; count lost, failed and correct answers."""
    expected = [stream(url, number).text for number in range(len(TOPICS))]
    before = replicas()
    assert len(before) == 2
    events = [threading.Event() for _ in range(10)]
    with ThreadPoolExecutor(len(events)) as pool:
        futures = [pool.submit(stream, url, i, event) for i, event in enumerate(events)]
        wait_until(lambda: sum(event.is_set() for event in events) >= 4, "streams run", 120)
        pid = min(before)
        engines = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        outcomes = [future.result() for future in futures]
    counts: Counter[str] = Counter()
    for number, outcome in enumerate(outcomes):
        correct = outcome.text == expected[number % len(TOPICS)]
        counts["lost" if not outcome.ended else "correct" if correct else "wrong"] += 1
    print(dict(counts))
    assert not counts["wrong"]
    lost = [outcome for outcome in outcomes if not outcome.ended]
    assert lost, "the kill hit nothing"
    (victim,) = {outcome.replica for outcome in lost if outcome.text}
    for number, outcome in enumerate(outcomes):
        assert expected[number % len(TOPICS)].startswith(outcome.text), "what was sent stays valid"
        assert outcome.ended or outcome.replica in (victim, ""), "it was on the other replica"
    # The next ones succeed at once, on the replica that is left ...
    for number in range(4):
        outcome = stream(url, number)
        assert (outcome.ended, outcome.text) == (True, expected[number])
        assert outcome.replica != victim
    # ... and another replica comes in the place of the dead one, whose engine died with it.
    wait_until(lambda: len(replicas() - {pid}) == 2, "a new replica", 240)
    assert not any(engine.is_running() for engine in engines)


def test_batches_go_on_where_they_stopped(model: Path, tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [{**question(i), "id": f"q{i}", "max_tokens": 60} for i in range(10)]
    lines[3] = {"id": "q3", "prompt": "Three fruits:", "vllm_xargs": {"pt_max_paths": 99}}
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
    command = [sys.executable, "-m", "deploy.ray.batch", str(questions), str(answers)]
    command += ["--model", str(model), "--options", json.dumps(options)]
    command += ["--gpus", "0", "--batch-size", "2"]

    def start() -> Any:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )

    def num_done() -> int:
        return len(answers.read_text("utf-8").splitlines()) if answers.exists() else 0

    first = start()
    wait_until(lambda: num_done() >= 2 or first.poll() is not None, "answers come", 300)
    assert first.poll() is None, first.stderr.read()[-3000:]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = num_done()
    assert 2 <= kept < 10
    with answers.open("a", encoding="utf-8") as torn:
        torn.write('{"id": "q9", "te')
    time.sleep(3)
    second = start()
    _, said = second.communicate(timeout=400)
    assert second.returncode == 0, said[-3000:]
    assert f"{kept} of 10 have an answer already" in said
    assert "10/10" in said or f"{10 - kept}/{10 - kept}" in said, "a progress bar"
    found = {}
    for line in answers.read_text("utf-8").splitlines():
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            continue
        assert answer["id"] not in found, "computed twice"
        found[answer["id"]] = answer
    assert set(found) == {f"q{i}" for i in range(10)}
    assert "pt_max_paths" in found.pop("q3")["error"]
    assert all(answer["text"] and answer["summary"] for answer in found.values())
