"""What an observer passes on to viewers, without a scheduler."""

from __future__ import annotations

import logging
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.logs import times_said
from vllm_parallel_think.observability.metrics.outage import FIRST_PAUSE, Outage
from vllm_parallel_think.observability.observed_group import Load, ObservedGroup, Viewer
from vllm_parallel_think.observability.observer import Observer


class Ends(Viewer):
    """Shows ends only, unless it is broken."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.broken = False

    def ended(self, observed: ObservedGroup, outcome: str) -> None:
        if self.broken:
            raise RuntimeError("a fault of its own")
        self.seen.append(outcome)


def observer_of(viewer: Viewer, clock: list[float]) -> Observer:
    """An observer of no groups, with one viewer."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=0),
        observability_config=SimpleNamespace(otlp_traces_endpoint=None),
    )
    observer = Observer(config, [], lambda: Load(0, 0, 0, 0))  # type: ignore[arg-type]
    observer._viewers = {"ends": viewer}
    observer._outages = defaultdict(lambda: Outage(lambda: clock[0]))
    return observer


def test_a_viewer_gets_the_events_it_shows() -> None:
    viewer, group = Ends(), Any
    observer = observer_of(viewer, [0.0])
    observer.started(group)  # type: ignore[arg-type]
    observer.changed(group)  # type: ignore[arg-type]
    observer.stalled()
    observer.ended(group, "branched")  # type: ignore[arg-type]
    assert viewer.seen == ["branched"]


def test_events_that_a_viewer_does_not_show_do_not_end_its_outage(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.parallel_think")
    viewer, clock, group = Ends(), [0.0], Any
    observer = observer_of(viewer, clock)
    viewer.broken = True
    observer.ended(group, "failed")  # type: ignore[arg-type]
    assert times_said(caplog, "shows no ends for now") == 1
    viewer.broken = False
    clock[0] += FIRST_PAUSE
    observer.started(group)  # type: ignore[arg-type]
    observer.stalled()
    assert times_said(caplog, "shows ends again") == 0
    observer.ended(group, "branched")  # type: ignore[arg-type]
    assert times_said(caplog, "shows ends again") == 1
    assert viewer.seen == ["branched"]
