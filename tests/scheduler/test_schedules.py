"""INV-2, INV-3 and INV-4 over schedules: whatever happens, answers equal the oracle's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.schedules import GRAMMARS, assert_answers, prompt, simulate
from tests.support.tiny import IdGrammar


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.name)
@pytest.mark.parametrize("every", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("num_drafts", [0, 3], ids=["", "speculative"])
def test_forced_preemption(
    asynchronous: bool,
    grammar: IdGrammar,
    every: int,
    num_drafts: int,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Preempting somebody every k steps changes no token."""
    rng = random.Random(every)
    simulation = simulate(
        tiny_model,
        tmp_path,
        grammar,
        asynchronous=asynchronous,
        num_blocks=200,
        num_drafts=num_drafts,
    )
    for number in range(6):
        simulation.add(prompt(rng), parallel=number % 3 != 2, pt_path_tokens=20)
    for step in range(1, 400):
        if every and step % every == 0:
            simulation.preempt(rng.randrange(8))
        if not simulation.step():
            break
    simulation.run()
    assert assert_answers(simulation, grammar, 80, 20) > 0
    assert (simulation.worker.num_kept > 100) == (num_drafts > 0)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("grammar", GRAMMARS[:2], ids=lambda g: g.name)
@pytest.mark.parametrize("num_drafts", [0, 3], ids=["", "speculative"])
def test_pools_too_small_for_all_groups(
    asynchronous: bool, grammar: IdGrammar, num_drafts: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Groups are evicted, replayed, and still write what they would have written alone."""
    evictions = forks = 0
    for seed in range(6):
        rng = random.Random(seed)
        num_blocks = rng.choice([30, 36, 48])
        simulation = simulate(
            tiny_model,
            tmp_path,
            grammar,
            asynchronous=asynchronous,
            num_blocks=num_blocks,
            max_model_len=(num_blocks - 1) * 16,
            max_num_seqs=rng.choice([6, 16]),
            max_num_batched_tokens=rng.choice([16, 33, 256]),
            num_drafts=num_drafts,
        )
        evict = simulation.scheduler.preemption.evict

        def count(state: Any, evict: Any = evict) -> None:
            nonlocal evictions
            evictions += 1
            evict(state)

        simulation.scheduler.preemption.evict = count
        for number in range(16):
            simulation.add(prompt(rng), parallel=number % 4 != 3, max_tokens=60, pt_path_tokens=15)
            for _ in range(rng.randrange(6)):
                simulation.step()
        simulation.run()
        forks += assert_answers(simulation, grammar, 60, 15)
    assert evictions > 0, "no pool was too small"
    assert forks > 0
