"""Request ids, which clients choose by ``X-Request-Id``, where people get to see them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig

from tests.support.schedules import crowd, simulate, simulation_config
from tests.support.tiny import IdGrammar
from vllm_parallel_think.core.errors import MAX_ID, short_id
from vllm_parallel_think.observability.observed_group import ObservedGroup, Viewer
from vllm_parallel_think.observability.page.timelines import TimelineWriter
from vllm_parallel_think.observability.tracing import SpanWriter
from vllm_parallel_think.scheduler.fault_fence import fence
from vllm_parallel_think.scheduler.group_table import GroupState

LONG = "chatcmpl-" + "x" * 100_000 + "-0-abcd1234"


def test_long_ids_lose_their_middle() -> None:
    assert short_id("chatcmpl-1") == "chatcmpl-1"
    assert short_id("x" * MAX_ID) == "x" * MAX_ID
    assert len(short_id(LONG)) == MAX_ID
    assert short_id(LONG).startswith("chatcmpl-xxx") and short_id(LONG).endswith("-0-abcd1234")


class Renaming(Viewer):
    """Lets a viewer see groups under another id."""

    def __init__(self, viewer: Any) -> None:
        self._viewer = viewer

    def ended(self, observed: ObservedGroup, outcome: str) -> None:
        assert isinstance(observed, GroupState)
        own, observed.root.request_id = observed.root.request_id, LONG
        try:
            self._viewer.ended(observed, outcome)
        finally:
            observed.root.request_id = own


def test_page_and_spans_show_them_short(exporter: Any, tiny_model: Path, tmp_path: Path) -> None:
    exporter.clear()
    simulation = simulate(tiny_model, tmp_path, IdGrammar(num_paths=4), asynchronous=False)
    config: VllmConfig = simulation_config(simulation)
    page = TimelineWriter(tmp_path, "0")
    simulation.scheduler.observer._viewers = {
        "timelines": Renaming(page),
        "spans": Renaming(SpanWriter(config)),
    }
    crowd(simulation, seed=3)
    simulation.run()
    page.write(())
    (file,) = tmp_path.glob("vllm-pt-timeline-*.json")
    ids = {request["id"] for request in json.loads(file.read_text())["requests"]}
    assert ids == {short_id(LONG)}
    groups = [s for s in exporter.get_finished_spans() if s.name == "parallel_think.group"]
    assert {span.attributes["vllm_pt.request_id"] for span in groups} == {short_id(LONG)}


def test_the_log_shows_them_short(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)

    class Root:
        request_id = LONG

    with fence(GroupState(Root(), None)):  # type: ignore[arg-type]
        raise RuntimeError("a fault")
    assert short_id(LONG) in caplog.text and "x" * MAX_ID not in caplog.text
