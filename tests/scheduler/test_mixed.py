"""Workers, trees, paths and plain requests in one engine: each writes what it writes alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.scheduler.mixture import Ask, Play, draw, run, send, simulate

SEEDS = range(100)
FOUND = (44, 91, 316, 636, 1253)
"""Seeds of plays that once went wrong."""
PATHS = "ids-3-kv-longest-0-at-start"


def engine(**changes: Any) -> dict[str, Any]:
    """An engine with a small pool of KV blocks."""
    values: dict[str, Any] = {"asynchronous": False, "num_blocks": 25, "block_size": 16}
    values |= {"max_model_len": 384, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    return {**values, "policy": "fcfs", "num_drafts": 0, **changes}


def workers(at: int, most: int = 60, visible: int = 150, **keys: Any) -> Ask:
    keys = {"pt_num_workers": 4, "pt_worker_tokens": most, **keys}
    prompt = tuple(range(171, 191))
    return Ask(at, prompt, visible, 0, {"parallel_think": "workers", **keys})


def paths(at: int, count: int = 4, most: int = 60, first: int = 180) -> Ask:
    keys = {"parallel_think": PATHS, "pt_num_paths": count, "pt_path_tokens": most}
    return Ask(at, tuple(range(first, first + 30)), 150, 0, keys)


def plain(at: int, length: int = 30, most: int = 60) -> Ask:
    return Ask(at, tuple([201] * length), most, 0, {"parallel_think": "off"})


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends by itself: every branch writes as much as it may."""
    from tests.support import simulator

    def word(state: bytes, *_grammar: Any) -> int:
        return random.Random(state).choice(simulator.TOKENS)

    monkeypatch.setattr(simulator, "sample", word)
    monkeypatch.setattr(simulator, "write", word)


def assert_right(asks: list[Ask], model: Path, folder: Path, **changes: Any) -> Any:
    play = Play(engine(**changes), tuple(asks), (0.0, 0.0, 0.0), 0)
    outcome = run(play, model, folder)
    assert outcome.wrong == []
    return outcome.counts


@pytest.mark.parametrize("first", SEEDS[::10])
def test_any_mixture(first: int, tiny_model: Path, tmp_path: Path) -> None:
    """INV-2 and INV-3 over everything at once; no step stands still."""
    for seed in range(first, first + 10):
        assert run(draw(seed), tiny_model, tmp_path).wrong == [], f"seed {seed}"


@pytest.mark.parametrize("seed", FOUND)
def test_plays_that_once_went_wrong(seed: int, tiny_model: Path, tmp_path: Path) -> None:
    assert run(draw(seed), tiny_model, tmp_path).wrong == []


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("delay", [3, 12])
@pytest.mark.parametrize("num_blocks", [19, 21, 23])
@pytest.mark.usefixtures("endless")
def test_older_workers_take_the_room_of_younger_paths(
    num_blocks: int, delay: int, policy: str, tiny_model: Path, tmp_path: Path
) -> None:
    """A group that is evicted while its branches run is taken out of the batch, and queued once."""
    sizes = {"num_blocks": num_blocks, "max_model_len": (num_blocks - 1) * 16, "policy": policy}
    counts = assert_right([workers(0), paths(delay)], tiny_model, tmp_path, **sizes)
    if (num_blocks, delay) == (21, 3):
        assert counts["ForkJoinGroup evicted"] > 0


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("delay", [3, 12])
@pytest.mark.parametrize("num_blocks", [19, 21, 23])
@pytest.mark.usefixtures("endless")
def test_younger_workers_make_room_for_older_paths(
    num_blocks: int, delay: int, policy: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Workers that are held keep their blocks: nothing is scheduled although rows run."""
    sizes = {"num_blocks": num_blocks, "max_model_len": (num_blocks - 1) * 16, "policy": policy}
    counts = assert_right([paths(0), workers(delay)], tiny_model, tmp_path, **sizes)
    if (num_blocks, delay) == (21, 3):
        assert counts["HogwildGroup evicted"] > 0


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("rows", [6, 7, 8])
def test_workers_step_together_where_rows_are_few(
    rows: int, policy: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Branches that wait in front of a worker do not take the row that was counted for it."""
    asks = [workers(0), *(paths(at, first=180 + at) for at in (2, 3, 4)), plain(5), plain(9)]
    sizes = {"num_blocks": 200, "max_model_len": 1024, "max_num_seqs": rows, "policy": policy}
    assert_right(asks, tiny_model, tmp_path, **sizes)


def test_long_prompt_beside_workers_whose_steps_are_short(tiny_model: Path, tmp_path: Path) -> None:
    """What workers leave of a step's tokens goes to prompts: no more steps than those take."""
    sizes = {"num_blocks": 900, "max_model_len": 4096, "max_num_batched_tokens": 128}
    play = Play(engine(**sizes), (), (0.0, 0.0, 0.0), 0)
    simulation = simulate(play, tiny_model, tmp_path)
    # Every token ends a step: in every step of the engine workers enter the batch.
    simulation.worker.teams.write = lambda _state: 12
    for _ in range(3):
        send(simulation, workers(0, most=400, visible=4000, pt_check_every=0))
    for _ in range(10):
        simulation.step()
    client = send(simulation, plain(0, length=300, most=4))
    steps = 0
    while not client.tokens:
        simulation.step()
        steps += 1
        # A bound is one step's: after the last group's end nobody would lift it.
        request = simulation.scheduler.requests[client.request_id]
        assert simulation.scheduler.gangs.most_tokens(request, 1000) == 1000
    assert all(c.finish is None for c in simulation.clients.values())
    rows_of_workers = 3 * 4 * 5
    assert steps <= -(-300 // (128 - rows_of_workers)) + 1


def test_steps_without_work_end(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours that lets the engine stand still costs the youngest request, not all."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_parallel_think.scheduler.preemption import Preemption

    play = Play(engine(), (), (0.0, 0.0, 0.0), 0)
    simulation = simulate(play, tiny_model, tmp_path)
    scheduler = simulation.scheduler
    del scheduler.preemption.end_standstill
    stalled: list[bool] = []
    monkeypatch.setattr(scheduler.observer, "stalled", lambda: stalled.append(True))
    old, young = (send(simulation, paths(0)) for _ in range(2))
    for _ in range(5):
        simulation.step()
    monkeypatch.setattr(Preemption, "make_room", lambda self: False)
    schedule = Scheduler.schedule

    def stand_still(self: Any, *args: Any) -> Any:
        budget, self.max_num_scheduled_tokens = self.max_num_scheduled_tokens, 0
        output = schedule(self, *args)
        self.max_num_scheduled_tokens = budget
        return output

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "schedule", stand_still)
        for _ in range(150):
            simulation.step()
    assert stalled == [True]
    assert "no step of the engine could go on with it" in young.finish
    simulation.run()
    assert old.finish in ("stop", "length")
