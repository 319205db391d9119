"""Paths that are cut because enough of their siblings have ended (``pt_termination``)."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.oracle import Budget, Oracle
from tests.support.schedules import prompt, simulate
from tests.support.tiny import IdGrammar

GRAMMAR = IdGrammar(num_paths=6, at_start=True)
SYNC = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@SYNC
@pytest.mark.parametrize("termination", ["first", "half", 0.8, "all"])
def test_paths_in_lock_step_are_cut_in_the_same_step(
    asynchronous: bool, termination: float | str, tiny_model: Path, tmp_path: Path
) -> None:
    from tests.support.simulator import hash_graph

    rng = random.Random(5)
    share = {"first": 0.0, "half": 0.5, "all": 1.0}.get(str(termination), termination)
    num_cut = 0
    for _ in range(6):
        simulation = simulate(tiny_model, tmp_path, GRAMMAR, asynchronous=asynchronous)
        client = simulation.add(
            prompt(rng), max_tokens=300, pt_path_tokens=30, pt_termination=termination
        )
        simulation.run()
        budget = Budget(300, path_tokens=30, termination=float(share))
        answer = Oracle(hash_graph(GRAMMAR), GRAMMAR, budget).answer(client.prompt)
        assert client.tokens == answer.visible
        assert client.summary is not None
        num_cut += client.summary["cut_paths"]
        assert client.summary["forks"] == 1
    assert num_cut > 3 or termination == "all"


@SYNC
def test_paths_are_cut_in_whatever_state_they_are(
    asynchronous: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """Preempted, waiting, in parts: every answer ends, and every block comes back."""
    for seed in range(12):
        rng = random.Random(seed)
        simulation = simulate(
            tiny_model,
            tmp_path,
            GRAMMAR,
            asynchronous=asynchronous,
            num_blocks=rng.choice([48, 96]),
            max_model_len=47 * 16,
            max_num_seqs=rng.choice([3, 8]),
            max_num_batched_tokens=rng.choice([16, 64]),
        )
        clients = []
        for _ in range(5):
            clients.append(
                simulation.add(
                    prompt(rng), pt_path_tokens=20, pt_termination=rng.choice(["first", "half"])
                )
            )
            for _ in range(rng.randrange(8)):
                if rng.random() < 0.4:
                    simulation.preempt(rng.randrange(8))
                simulation.step()
        simulation.run()
        for client in clients:
            assert client.finish in ("stop", "length")


@SYNC
def test_number_of_paths_and_budget_of_the_summary(
    asynchronous: bool, tiny_model: Path, tmp_path: Path
) -> None:
    from tests.support.simulator import hash_graph

    rng = random.Random(1)
    simulation = simulate(
        tiny_model, tmp_path, GRAMMAR, asynchronous=asynchronous, options={"max_paths": 16},
        num_blocks=200, max_num_seqs=20,
    )  # fmt: skip
    for num_paths in (1, 2, 8, 12):
        client = simulation.add(
            prompt(rng),
            max_tokens=400,
            pt_num_paths=num_paths,
            pt_path_tokens=12,
            pt_summary_tokens=9,
        )
        simulation.run()
        grammar = replace(GRAMMAR, num_paths=num_paths)
        budget = Budget(400, path_tokens=12, summary_tokens=9)
        answer = Oracle(hash_graph(grammar), grammar, budget).answer(client.prompt)
        assert client.tokens == answer.visible
        assert client.finish == answer.finish


def test_paths_have_a_temperature_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    simulation = simulate(tiny_model, tmp_path, GRAMMAR, asynchronous=False)
    simulation.add(prompt(random.Random(2)), pt_path_tokens=6, pt_path_temperature=0.5)
    seen: dict[str, set[float]] = {}
    while simulation.step():
        for state in simulation.scheduler.groups:
            for node, request in state.requests.items():
                params = request.sampling_params
                seen.setdefault(node.kind.value, set()).add(params.temperature)
    assert (seen["path"], seen["conclusion"]) == ({0.5}, {0.0})
