"""Independent answers over one shared prompt (``pt_vote``), on the real scheduler."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.oracle import Budget, Oracle
from tests.support.schedules import prompt, simulate
from tests.support.tiny import EOS, IdGrammar

GRAMMAR = IdGrammar(num_paths=4, at_start=True)
SYNC = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@SYNC
@pytest.mark.parametrize("every", [0, 2, 5])
def test_every_answer_is_what_a_plain_request_writes(
    asynchronous: bool, every: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Greedy answers are all alike, so whichever wins is the plain one."""
    from tests.support.simulator import hash_graph

    rng = random.Random(every)
    simulation = simulate(tiny_model, tmp_path, GRAMMAR, asynchronous=asynchronous, num_blocks=200)
    clients = [
        simulation.add(prompt(rng), pt_vote=True, pt_num_paths=rng.choice([1, 2, 4]), max_tokens=50)
        for _ in range(5)
    ]
    clients.append(simulation.add([200], pt_vote=True, max_tokens=50))
    for step in range(1, 400):
        if every and step % every == 0:
            simulation.preempt(rng.randrange(8))
        if not simulation.step():
            break
    simulation.run()
    for client in clients:
        answer = Oracle(hash_graph(GRAMMAR), GRAMMAR, Budget(50, max_depth=0)).answer(client.prompt)
        visible = [token for token in answer.visible if token != EOS]
        assert [token for token in client.tokens if token != EOS] == visible
        assert client.finish == answer.finish
        assert client.summary is not None
        paths = client.summary.get("votes", {"paths": 1})["paths"]
        assert client.summary["generated_tokens"] >= paths * len(visible)
    assert clients[-1].summary["fallbacks"] == {"prompt_of_one_token": 1}


@SYNC
def test_client_that_leaves_before_the_vote(
    asynchronous: bool, tiny_model: Path, tmp_path: Path
) -> None:
    rng = random.Random(1)
    for steps in range(1, 12):
        simulation = simulate(tiny_model, tmp_path, GRAMMAR, asynchronous=asynchronous)
        client = simulation.add(prompt(rng), pt_vote=True, max_tokens=40)
        for _ in range(steps):
            simulation.step()
        if client.finish is None:
            simulation.abort(client)
        simulation.run()
