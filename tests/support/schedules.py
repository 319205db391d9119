"""Simulations over a random grammar: their requests, and the answers they must give."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracle import Budget, Oracle
from tests.support.tiny import VOCAB_SIZE, IdGrammar

GRAMMARS = [
    IdGrammar(num_paths=2),
    IdGrammar(num_paths=3, fork_after=(10,), path_after=(11, 12)),
    IdGrammar(num_paths=4, join_mode="reprefill"),
    IdGrammar(num_paths=3, at_start=True, path_after=(11,)),
]
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def prompt(rng: random.Random) -> list[int]:
    """Draw a prompt of up to fifty words."""
    return [rng.randrange(170, VOCAB_SIZE) for _ in range(rng.randint(1, 50))]


def simulate(model: Path, folder: Path, grammar: IdGrammar, **kwargs: Any) -> Any:
    """Make a simulation whose text does not depend on the load."""
    from tests.support.simulator import Simulation

    simulation = Simulation(model, grammar.write(folder), grammar, **kwargs)
    # Whether the pool has room for a fork depends on the load; here the text must not.
    simulation.scheduler.lifecycle.has_room = lambda num_blocks: True
    return simulation


def simulation_of(model: Path, profile: str, **kwargs: Any) -> Any:
    """Make a simulation with a profile of the test's own."""
    from tests.support.simulator import Simulation

    return Simulation(model, profile, IdGrammar(), **kwargs)


def write_profile(folder: Path, fork: str, start: str, more: str = "") -> str:
    """Write a profile of token ids whose fork a test chooses; return its path."""
    path = folder / "attack.toml"
    path.write_text(
        f"""
name = "attack"
summary = "names read from words"
{more}
[fork]
trigger = [20]
{fork}
[path]
start = {start}
end = [30]
close = [7]
[join]
start = [8, 9]
""",
        "utf-8",
    )
    return str(path)


class Script:
    """Samples what a test wrote down, by the tokens of the row so far; words otherwise."""

    def __init__(self, simulation: Any, choose: Callable[[list[int]], int]) -> None:
        worker = simulation.worker

        def run(req_id: str, output: Any) -> list[int]:
            row = worker.rows[req_id]
            start, num = row.num_computed, output.num_scheduled_tokens[req_id]
            for index in range(start, start + num):
                worker._write(row, index, row.tokens[index])
            if start + num < len(row.tokens):
                return []
            token = choose(row.tokens)
            row.tokens.append(token)
            return [token]

        worker._run = run


def crowd(simulation: Any, seed: int, num_clients: int = 6) -> random.Random:
    """Send some requests, one of them plain."""
    rng = random.Random(seed)
    for number in range(num_clients):
        simulation.add(prompt(rng), parallel=number != 2, max_tokens=150, pt_path_tokens=20)
    return rng


def assert_answers(simulation: Any, grammar: IdGrammar, max_tokens: int, path_tokens: int) -> int:
    """Compare every answer that was not aborted with the oracle's; return the number of forks.

    An answer that was refused a fork for want of room in the index space goes on sequentially,
    which the oracle does not know; it must say so.
    """
    from tests.support.simulator import hash_graph

    graph, forks = hash_graph(grammar), 0
    for client in simulation.clients.values():
        depth = 2 if client.parallel else 0
        budget = Budget(max_tokens=max_tokens, max_depth=depth, path_tokens=path_tokens)
        answer = Oracle(graph, grammar, budget).answer(client.prompt)
        if "max_model_len" in (client.summary or {}).get("fallbacks", ()):
            continue
        if client.aborted:
            assert client.tokens == answer.visible[: len(client.tokens)]
            continue
        assert client.tokens == answer.visible
        assert client.finish == answer.finish
        forks += answer.num_forks
    return forks


def simulation_config(simulation: Any) -> Any:
    """Return its configuration, with somewhere to send spans to."""
    config = simulation.scheduler.vllm_config
    config.observability_config.otlp_traces_endpoint = "http://127.0.0.1:1"
    return config
