"""INV-2 to INV-5 under random schedules: add, step, preempt, abort, reset, in pools of any size."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.schedules import GRAMMARS, assert_answers, simulate
from tests.support.tiny import VOCAB_SIZE, IdGrammar

MAX_TOKENS, PATH_TOKENS = 60, 15

REQUEST = st.tuples(st.just("add"), st.integers(1, 60), st.booleans())
ACTION = st.one_of(
    st.just(("step",)),
    st.just(("step",)),
    st.tuples(st.just("steps"), st.integers(2, 40)),
    REQUEST,
    st.tuples(st.just("preempt"), st.integers(0, 7)),
    st.tuples(st.just("abort"), st.integers(0, 7)),
    st.just(("reset",)),
)


def play(simulation: Any, actions: list[Any], seed: int) -> None:
    """Run a script of events, then run to the end."""
    rng = random.Random(seed)
    for action in actions:
        kind = action[0]
        if kind == "add":
            words = [rng.randrange(170, VOCAB_SIZE) for _ in range(action[1])]
            simulation.add(
                words, parallel=action[2], max_tokens=MAX_TOKENS, pt_path_tokens=PATH_TOKENS
            )
        elif kind == "step":
            simulation.step()
        elif kind == "steps":
            for _ in range(action[1]):
                simulation.step()
        elif kind == "preempt":
            simulation.preempt(action[1])
        elif kind == "abort":
            open_clients = [c for c in simulation.clients.values() if c.finish is None]
            if open_clients:
                simulation.abort(open_clients[action[1] % len(open_clients)])
        else:
            simulation.reset()
        simulation.check()
    simulation.run()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.name)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    actions=st.lists(ACTION, min_size=4, max_size=60),
    num_blocks=st.sampled_from([48, 64, 96, 160, 400]),
    max_num_seqs=st.sampled_from([1, 2, 3, 8]),
    policy=st.sampled_from(["fcfs", "priority"]),
    num_drafts=st.sampled_from([0, 1, 4]),
    seed=st.integers(0, 1000),
)
def test_any_schedule(
    asynchronous: bool,
    grammar: IdGrammar,
    tiny_model: Path,
    tmp_path: Path,
    actions: list[Any],
    num_blocks: int,
    max_num_seqs: int,
    policy: str,
    num_drafts: int,
    seed: int,
) -> None:
    """Every answer equals the oracle's, every block comes back, and nothing raises."""
    simulation = simulate(
        tiny_model,
        tmp_path,
        grammar,
        asynchronous=asynchronous,
        num_blocks=num_blocks,
        max_model_len=(num_blocks - 1) * 16,
        max_num_seqs=max_num_seqs,
        policy=policy,
        num_drafts=num_drafts,
    )
    play(simulation, [("add", 20, True), *actions], seed)
    assert_answers(simulation, grammar, MAX_TOKENS, PATH_TOKENS)
