"""The sums that Prometheus sees are those of the summaries that clients get."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.logs import times_said
from tests.support.schedules import crowd, simulate
from tests.support.scrape import FIGURES, growth, here, total
from tests.support.tiny import IdGrammar
from vllm_parallel_think.observability.metrics.outage import FIRST_PAUSE, Outage
from vllm_parallel_think.observability.metrics.recorder import Recorder

GRAMMAR = IdGrammar(num_paths=4)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_counters_are_the_sums_of_the_summaries(
    asynchronous: bool, tiny_model: Path, tmp_path: Path
) -> None:
    simulation = simulate(tiny_model, tmp_path, GRAMMAR, asynchronous=asynchronous)
    before = here()
    crowd(simulation, seed=3)
    busy = []
    while simulation.step():
        if simulation.scheduler.groups:
            simulation.scheduler.observer._look()
            now = here()
            busy.append([now.sum(f"vllm_pt_{g}") for g in ("active_groups", "active_branches")])
            assert now.sum("vllm_pt_held_blocks") == simulation.scheduler.held_blocks.num_held
    after = here()
    grown = growth(before, after)

    parallel = [client for client in simulation.clients.values() if client.parallel]
    summaries = [client.summary for client in parallel]
    branched = [summary for summary in summaries if summary["forks"]]
    assert branched
    for name, key in FIGURES.items():
        assert grown(name) == total(summaries, key), name
    assert grown("vllm_pt_requests_total", outcome="branched") == len(branched)
    assert grown("vllm_pt_requests_total") == len(parallel)
    assert grown("vllm_pt_fork_width_sum") == total(branched, "widest_fork")
    assert grown("vllm_pt_parallelism_ratio_count") == len(branched)
    assert grown("vllm_pt_parallelism_ratio_sum") == pytest.approx(
        total(branched, "parallelism_ratio")
    )
    fallbacks = sum((Counter(summary["fallbacks"]) for summary in summaries), Counter())
    for reason, count in fallbacks.items():
        assert grown("vllm_pt_fallbacks_total", reason=reason) == count
    assert grown("vllm_pt_fallbacks_total") == fallbacks.total()
    assert max(groups for groups, _ in busy) > 1
    assert max(branches for _, branches in busy) > 4
    for gauge in ("active_groups", "active_branches", "held_blocks"):
        assert after.sum(f"vllm_pt_{gauge}") == 0, gauge


def test_paths_wait_for_their_join_once(tiny_model: Path, tmp_path: Path) -> None:
    """A path waits from its own end to the end of the last of its siblings, which does not wait."""
    simulation = simulate(tiny_model, tmp_path, GRAMMAR, asynchronous=False)
    before = here()
    crowd(simulation, seed=5)
    num_paths = 0
    while simulation.step():
        pass
    grown = growth(before, here())
    joined = [c.summary for c in simulation.clients.values() if c.summary is not None]
    num_paths = total(joined, "paths")
    num_forks = total(joined, "forks")
    assert num_forks <= grown("vllm_pt_join_wait_seconds_count") <= num_paths
    assert grown("vllm_pt_join_wait_seconds_bucket", le="0.01") >= num_forks
    assert 0 < grown("vllm_pt_join_wait_seconds_sum") < 60


def test_every_request_ends_with_one_outcome(tiny_model: Path, tmp_path: Path) -> None:
    simulation = simulate(tiny_model, tmp_path, GRAMMAR, asynchronous=True)
    before = here()
    rng = crowd(simulation, seed=7, num_clients=8)
    for _ in range(6):
        simulation.step()
    family = next(iter(simulation.scheduler.groups))
    broken = simulation.clients[family.root.request_id]
    family.error = "internal error: a test says so"
    gone = 0
    while simulation.step():
        waiting = [
            c
            for c in simulation.clients.values()
            if c.parallel and c is not broken and not c.finish
        ]
        if gone < 3 and waiting and rng.random() < 0.1:
            client = rng.choice(waiting)
            if not client.aborted:
                gone += 1
                simulation.abort(client)
    grown = growth(before, here())
    outcome = "vllm_pt_requests_total"
    assert gone == 3
    assert grown(outcome, outcome="aborted") == gone
    assert grown(outcome, outcome="failed") == 1
    assert grown(outcome) == 7
    assert here().sum("vllm_pt_held_blocks") == here().sum("vllm_pt_active_groups") == 0


def test_a_fault_in_counting_stops_the_counting_for_a_while(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a fault of its own")

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.parallel_think")
    simulation = simulate(tiny_model, tmp_path, GRAMMAR, asynchronous=False)
    observer = simulation.scheduler.observer
    clock = [0.0]
    observer._outages = defaultdict(lambda: Outage(lambda: clock[0]))
    crowd(simulation, seed=9)
    with monkeypatch.context() as broken:
        broken.setattr(Recorder, "ended", fail)
        simulation.run()
    assert all(client.finish for client in simulation.clients.values())
    assert times_said(caplog, "shows no metrics for now") == 1
    before = here()
    crowd(simulation, seed=9)
    simulation.run()
    assert growth(before, here())("vllm_pt_requests_total") == 0, "too early to try again"
    clock[0] += FIRST_PAUSE
    before = here()
    crowd(simulation, seed=9)
    simulation.run()
    assert growth(before, here())("vllm_pt_requests_total") == 5
    assert times_said(caplog, "shows metrics again") == 1
