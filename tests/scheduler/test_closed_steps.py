"""Workers' steps that are cut and closed, on the real scheduler: the same whatever the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.hogwild_cases import CLOSE, ENDS, FORCED, NAMES, write_recipe
from tests.support.schedules import simulation_of
from tests.support.tiny import EOS

LAYOUTS = ["combined", "interleaved", "contiguous"]


def engine(model: Path, folder: Path, **sizes: Any) -> Any:
    recipe = write_recipe(folder, close=list(CLOSE), max_step_tokens=5, marks=(44, 45), found=[])
    sizes = {"num_blocks": 300, "max_num_batched_tokens": 256, "max_num_seqs": 16, **sizes}
    return simulation_of(model, recipe, asynchronous=False, **sizes)


def ask(simulation: Any, number: int, layout: str) -> Any:
    options = {"pt_num_workers": 2 + number % 3, "pt_worker_tokens": 12, "pt_check_every": 0}
    prompt = [200 + number] * (9 + number)
    return simulation.add(prompt, max_tokens=300, pt_layout=layout, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_blocks", [300, 28])
def test_steps_are_closed_alike_alone_and_beside_others(
    layout: str, num_blocks: int, tiny_model: Path, tmp_path: Path
) -> None:
    together = engine(tiny_model, tmp_path, num_blocks=num_blocks, max_model_len=400)
    clients = [ask(together, number, layout) for number in range(6)]
    for step in range(1, 60):
        if step % 7 == 0:
            together.preempt(step)
        if not together.step():
            break
    together.run()
    num_closed = 0
    for number, client in enumerate(clients):
        alone = engine(tiny_model, tmp_path, max_model_len=400)
        lone = ask(alone, number, layout)
        alone.run()
        assert (client.tokens, client.finish) == (lone.tokens, lone.finish)
        assert not (client.summary or {})["fallbacks"]
        num_closed += sum(a == CLOSE[-1] for a in client.tokens)
        assert_no_step_is_glued(client.tokens)
    assert num_closed > 8


def assert_no_step_is_glued(tokens: list[int]) -> None:
    """In front of a name stands what ends a step, or what closes one."""
    body = tokens[: tokens.index(FORCED[0])] if FORCED[0] in tokens else tokens
    for at in range(1, len(body) - 1):
        if body[at] in NAMES and body[at + 1] > 100 and body[at + 2 : at + 3] == [45]:
            assert body[at - 1] in (*ENDS, CLOSE[-1], EOS), body[at - 3 : at + 3]
