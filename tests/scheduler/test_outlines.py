"""Outlines that the client does not see, in vLLM's scheduler: whatever happens, the same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import EOS, IdGrammar
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.profile import Profile
from vllm_parallel_think.core.fork_join.tag_scanner import Grammar

FIRST_ID = 10
LIST = {
    "0.0": "Try:\n\n",
    "0.1": "\n1. **Eat well**: x",
    "0.2": " Sleep - y",
    "0.3": "3. Walk\n",
    "0.4": "4. eat WELL: z",
    "0.5/0.0": " Fruit, daily.\n\nMore",
    "0.5/1.0": " Long.\n3. **W",
    "0.5/2.0": " Far:\n\nto town.\n4",
    "0.6": " do it.\n\nMore",
}
TEXT = "Try:\n1. **Eat well**: Fruit, daily.\n\n2. **Sleep**: Long.\n\n"
TEXT += "3. **Walk**: Far:\n\nto town.\n\n"
TEXT += "In short, do it.\n\n"
NO_LIST = {"0.0": "A.\n\n", "0.1": " b: x", "0.2": " b\n", "0.3": "C.\n\n", "0.5": "D."}
"""A draft that repeats its title, and one that is empty."""


class Letters:
    """A vocabulary of single characters."""

    def __init__(self) -> None:
        self._letters: list[str] = []

    def piece(self, token_id: int) -> str:
        known = 0 <= token_id - FIRST_ID < len(self._letters)
        return self._letters[token_id - FIRST_ID] if known else ""

    def text(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.piece, token_ids))

    def encode(self, text: str) -> list[int]:
        self._letters += [c for c in dict.fromkeys(text) if c not in self._letters]
        return [FIRST_ID + self._letters.index(c) for c in text]


def scripted(model: Path, scripts: Mapping[str, str], vocabulary: Letters, **kwargs: Any) -> Any:
    """Return a simulation in which each branch writes its script, by its place in the tree."""
    from tests.support.simulator import Simulation

    simulation = Simulation(model, "skeleton", IdGrammar(), **kwargs)
    profile = load_profile("skeleton")
    assert isinstance(profile, Profile)
    simulation.scheduler.opening.grammars["skeleton"] = Grammar(profile, vocabulary)
    worker = simulation.worker
    given: dict[str, int] = {}

    def run(req_id: str, output: Any) -> list[int]:
        row = worker.rows[req_id]
        start, num = row.num_computed, output.num_scheduled_tokens[req_id]
        for index in range(start, start + num):
            worker._write(row, index, row.tokens[index])
        if start + num < len(row.tokens):
            return []
        address = req_id.partition("#")[2].rpartition("-")[0] or "0.0"
        written = len(row.tokens) - given.setdefault(req_id, len(row.tokens))
        script = vocabulary.encode(scripts.get(address, ""))
        token = script[written] if written < len(script) else EOS
        row.tokens.append(token)
        return [token]

    worker._run = run
    return simulation


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("every", [0, 1, 2, 3, 5])
def test_list_is_the_same_text_whoever_is_preempted_INV2_INV3(
    asynchronous: bool, every: int, tiny_model: Path
) -> None:
    vocabulary = Letters()
    simulation = scripted(tiny_model, LIST, vocabulary, asynchronous=asynchronous, num_blocks=200)
    clients = [simulation.add(vocabulary.encode("Well?" * n), max_tokens=300) for n in (1, 7)]
    count = 0
    while simulation.step():
        count += 1
        if every and count % every == 0 and count < 400:
            simulation.preempt(count // every)
    simulation.run()
    for client in clients:
        assert vocabulary.text(client.tokens) == TEXT
        assert client.finish == "stop"
        assert client.summary["forks"] == 1 and client.summary["paths"] == 3


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("every", [0, 2, 3])
def test_answer_goes_on_where_no_list_comes_of_it_INV2_INV3(
    asynchronous: bool, every: int, tiny_model: Path
) -> None:
    vocabulary = Letters()
    simulation = scripted(
        tiny_model, NO_LIST, vocabulary, asynchronous=asynchronous, num_blocks=200
    )
    client = simulation.add(vocabulary.encode("Well?"), max_tokens=100)
    count = 0
    while simulation.step():
        count += 1
        if every and count % every == 0 and count < 200:
            simulation.preempt(count // every)
    simulation.run()
    assert vocabulary.text(client.tokens) == "A.\n\nC.\n\nD."
    assert client.finish == "stop"
    assert client.summary["forks"] == 0
    assert client.summary["fallbacks"] == {"fewer_than_two_paths": 2}


def test_answer_ends_at_its_budget_while_a_list_is_looked_for(tiny_model: Path) -> None:
    for max_tokens in (3, 5, 6, 7, 20, 60, len(TEXT) - 1):
        vocabulary = Letters()
        simulation = scripted(tiny_model, LIST, vocabulary, asynchronous=True, num_blocks=200)
        client = simulation.add(vocabulary.encode("Well?"), max_tokens=max_tokens)
        simulation.run()
        assert len(client.tokens) == max_tokens and client.finish == "length"
