"""``min_tokens`` and ``ignore_eos``: what a client asks for goes before what the grammar says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracle import Budget, Oracle
from tests.support.schedules import MODES, Script, prompt, simulate, simulation_of, write_profile
from tests.support.tiny import EOS, IdGrammar

GRAMMARS = [
    IdGrammar(num_paths=2, join_end=(150, 151)),
    IdGrammar(num_paths=2, join_end=(150, 151), join_mode="reprefill"),
    IdGrammar(num_paths=3, join_end=(150, 151), at_start=True),
]
BOUNDS: list[dict[str, Any]] = [
    {},
    {"min_tokens": 60},
    {"min_tokens": 100},
    {"ignore_eos": True},
    {"min_tokens": 30, "ignore_eos": True},
]


@MODES
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.name)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_answers_are_as_long_as_was_asked_for_INV2(
    asynchronous: bool,
    grammar: IdGrammar,
    bounds: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """The end tag of a conclusion counts as little as the end of the text does in vLLM."""
    from tests.support.simulator import hash_graph

    rng = random.Random(5)
    simulation = simulate(tiny_model, tmp_path, grammar, asynchronous=asynchronous, num_blocks=200)
    for _ in range(6):
        simulation.add(prompt(rng), max_tokens=100, sampling=bounds, pt_path_tokens=12)
    for step in range(1, 200):
        if step % 5 == 0:
            simulation.preempt(rng.randrange(8))
        if not simulation.step():
            break
    simulation.run()
    budget = Budget(100, path_tokens=12, **bounds)
    ends, graph = set(), hash_graph(grammar)
    for client in simulation.clients.values():
        answer = Oracle(graph, grammar, budget).answer(client.prompt)
        assert (client.tokens, client.finish) == (answer.visible, answer.finish)
        assert len(client.tokens) >= bounds.get("min_tokens", 0)
        if bounds.get("ignore_eos"):
            assert len(client.tokens) == 100
        ends.add(client.tokens[-1] in grammar.join_end and client.finish == "stop")
    assert (True in ends) == ("ignore_eos" not in bounds and bounds.get("min_tokens") != 100)


@MODES
def test_every_independent_answer_is_long_enough(
    asynchronous: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """Whoever wins a vote is the answer, so all of them keep the client's lower bound."""
    from tests.support.simulator import hash_graph

    grammar, rng = IdGrammar(num_paths=3, at_start=True), random.Random(2)
    simulation = simulate(tiny_model, tmp_path, grammar, asynchronous=asynchronous, num_blocks=200)
    for least in (0, 30, 49, 50):
        client = simulation.add(
            prompt(rng), max_tokens=50, sampling={"min_tokens": least}, pt_vote=True
        )
        simulation.run()
        budget = Budget(50, max_depth=0, min_tokens=least)
        answer = Oracle(hash_graph(grammar), grammar, budget).answer(client.prompt)
        ended = [token for token in answer.visible if token != EOS]
        assert [token for token in client.tokens if token != EOS] == ended
        assert len(ended) >= least


@MODES
@pytest.mark.parametrize("least", [0, 30])
def test_a_stop_token_in_a_path_ends_the_path_only_where_the_answer_is_too_short(
    asynchronous: bool, least: int, tiny_model: Path, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path, "num_paths = 2", "[5, 6]")
    simulation = simulation_of(tiny_model, profile, asynchronous=asynchronous)

    def choose(tokens: list[int]) -> int:
        if len(tokens) < 12:
            return 20 if len(tokens) == 11 else 60
        if 8 in tokens:  # in the conclusion
            return EOS if tokens.count(61) > 40 else 61
        return 77 if tokens[-1] == 62 else 62

    Script(simulation, choose)
    client = simulation.add(
        [200] * 10, max_tokens=200, sampling={"min_tokens": least, "stop_token_ids": [77]}
    )
    simulation.run(500)
    if least:
        assert client.tokens.count(77) == 2 and client.tokens[-1] == EOS
        assert len(client.tokens) >= least
    else:
        assert client.tokens[-1] == 77 and client.tokens.count(77) == 1
