"""The page's data: from a real scheduler, through the file, to what the endpoint answers."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.support.schedules import crowd, prompt, simulate
from tests.support.tiny import IdGrammar
from vllm_parallel_think.observability.metrics import export
from vllm_parallel_think.observability.page import timelines
from vllm_parallel_think.observability.page.endpoint import PATH, PageEndpoint

PAGE = (
    files("vllm_parallel_think.observability.page")
    .joinpath("page.html")
    .read_text(encoding="utf-8")
)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process's engine and front end meet."""
    found = tmp_path / "metrics"
    found.mkdir()
    monkeypatch.delenv(export.VLLM_DIRECTORY, raising=False)
    monkeypatch.setenv(export.DIRECTORY, str(found))
    monkeypatch.setattr(export, "_served", (os.getpid(), str(found)))
    monkeypatch.setattr(export, "_homes", {})  # other tests' values have their place elsewhere
    return found


@pytest.fixture
def client(directory: Path) -> Iterator[TestClient]:
    """The page's routes on an application of their own."""
    app = FastAPI()
    PageEndpoint().attach_router(app)
    with TestClient(app) as client:
        yield client


def play(simulation: Any, directory: Path) -> Iterator[None]:
    """Run a simulation whose observer writes timelines; pause after each step."""
    writer = timelines.TimelineWriter(directory, "0")
    simulation.scheduler.observer._viewers = {"timelines": writer}
    while simulation.step():
        simulation.scheduler.observer._look()
        yield


def test_requests_are_shown_while_they_run_and_behind_their_end(
    client: TestClient, directory: Path, tiny_model: Path, tmp_path: Path
) -> None:
    simulation = simulate(tiny_model, tmp_path, IdGrammar(num_paths=4), asynchronous=False)
    crowd(simulation, seed=3)
    grown: dict[str, list[int]] = {}
    for _ in play(simulation, directory):
        for request in client.get(f"{PATH}/requests.json").json()["requests"]:
            if request["outcome"] is None:
                tokens = sum(part["tokens"] for part in request["segments"])
                grown.setdefault(request["id"], []).append(tokens)
    parallel = [c for c in simulation.clients.values() if c.parallel]
    assert set(grown) == {c.request_id for c in parallel}
    assert any(len(set(counts)) > 5 for counts in grown.values()), "tokens grow while it runs"

    shown = client.get(f"{PATH}/requests.json").json()["requests"]
    assert {request["id"] for request in shown} == {c.request_id for c in parallel}
    for request in shown:
        summary = simulation.clients[request["id"]].summary
        assert request["outcome"] == ("branched" if summary["forks"] else "unbranched")
        assert request["paths"] == summary["paths"]
        lanes = {part["lane"] for part in request["segments"]}
        assert len(lanes) <= 1 + summary["paths"]
        for part in request["segments"]:
            assert part["parent"] in lanes or part["depth"] == 0
            times = [part[key] for key in ("started", "first", "ended") if part[key] is not None]
            assert times == sorted(times)


def test_what_the_end_cuts_off_is_shown_as_cut(
    client: TestClient, directory: Path, tiny_model: Path, tmp_path: Path
) -> None:
    simulation = simulate(tiny_model, tmp_path, IdGrammar(num_paths=4), asynchronous=False)
    rng = random.Random(3)
    for _ in range(8):
        simulation.add(prompt(rng), max_tokens=60, pt_path_tokens=20)
    for _ in play(simulation, directory):
        pass
    num_cut = 0
    for request in client.get(f"{PATH}/requests.json").json()["requests"]:
        parts, one = request["segments"], simulation.clients[request["id"]]
        assert len({part["lane"] for part in parts}) == 1 + request["paths"]
        assert sum(part["tokens"] for part in parts) == request["generated_tokens"]
        assert all(part["ended"] is not None for part in parts if part["started"] is not None)
        assert sum(part["tokens"] for part in parts if not part["cut"]) <= len(one.tokens)
        cuts = [part["cut"] for part in parts]
        assert cuts == sorted(cuts), "what is behind a cut is cut, too"
        assert one.finish == "length" or not any(cuts)
        num_cut += sum(cuts)
    assert num_cut >= 8


def contrast(one: str, other: str) -> float:
    """Return the ratio of two colours' luminance, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        values = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [r":root", r':root\[data-theme="dark"\]'], ids=["light", "dark"])
def test_texts_stand_out_in_both_colour_schemes(scheme: str) -> None:
    (rules,) = re.findall(rf"^{scheme} {{(.*?)}}", PAGE, re.DOTALL | re.MULTILINE)
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", rules))
    for text in ("text", "quiet", "gain", "live"):
        for below in ("card", "page"):
            assert contrast(colors[text], colors[below]) >= 4.5, (text, below)
    for bar in ("trunk", "conclusion", "wait", *(f"p{number}" for number in range(6))):
        assert contrast(colors[bar], colors["card"]) >= 3, bar


def test_the_file_is_bounded(directory: Path, tiny_model: Path, tmp_path: Path) -> None:
    simulation = simulate(tiny_model, tmp_path, IdGrammar(num_paths=4), asynchronous=False)
    crowd(simulation, seed=3, num_clients=60)
    largest = most_live = 0
    for _ in play(simulation, directory):
        requests = timelines.read(directory)["requests"]
        largest = max(largest, len(requests))
        most_live = max(most_live, sum(request["outcome"] is None for request in requests))
        assert all(len(r["segments"]) <= timelines.MAX_SEGMENTS for r in requests)
    assert most_live == timelines.MAX_LIVE
    assert largest <= timelines.MAX_LIVE + timelines.MAX_ENDED
    assert len(timelines.read(directory)["requests"]) == timelines.MAX_ENDED


def test_files_of_dead_engines_and_broken_ones_are_passed_over(directory: Path) -> None:
    request = {"id": "r", "arrived": 1.0}
    dead, broken = 2**22 + 5, os.getppid()  # above the largest process id
    (directory / f"vllm-pt-timeline-{dead}.json").write_text("{}")
    (directory / f"vllm-pt-timeline-{broken}.json").write_text('{"engine"')
    (directory / f"vllm-pt-timeline-{os.getpid()}.json").write_text(
        json.dumps({"engine": "1", "requests": [request]})
    )
    found = timelines.read(directory)
    assert found["requests"] == [{**request, "engine": "1"}]
    assert not (directory / f"vllm-pt-timeline-{dead}.json").exists()
    assert timelines.read(None)["requests"] == []


def test_the_page_loads_nothing_foreign_and_says_so(client: TestClient) -> None:
    answer = client.get(PATH)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    rules = answer.headers["content-security-policy"]
    assert "default-src 'none'" in rules and "unsafe" not in rules
    assert len(re.findall(r"(?:script|style)-src 'sha256-", rules)) == 2
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?:""", PAGE)
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in PAGE
