"""INV-2 on a random model: tokens and K/V equal the dense oracle's, whatever the schedule."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracle import Budget, Oracle, assert_equal, prompts
from tests.support.tiny import IdGrammar

CASES = [
    pytest.param(IdGrammar(num_paths=2), {"block_size": 16}, id="2-paths-block-16"),
    pytest.param(IdGrammar(num_paths=3), {"block_size": 32}, id="3-paths-block-32"),
    pytest.param(
        IdGrammar(num_paths=8),
        {"block_size": 128, "max_model_len": 8192, "depth": 1},
        id="8-paths-block-128",
    ),
    pytest.param(
        IdGrammar(num_paths=3, fork_after=(10,), path_after=(11, 12)),
        {"block_size": 16},
        id="separators",
    ),
    pytest.param(IdGrammar(num_paths=3, join_mode="reprefill"), {"block_size": 16}, id="reprefill"),
    pytest.param(
        IdGrammar(num_paths=3, stride=40), {"block_size": 16, "depth": 1}, id="paths-in-a-stride"
    ),
    pytest.param(
        IdGrammar(num_paths=3, join_position="total"), {"block_size": 16}, id="join-behind-total"
    ),
    pytest.param(
        IdGrammar(num_paths=8, at_start=True, path_after=(11,)),
        {"block_size": 16, "depth": 1},
        id="at-start",
    ),
    pytest.param(
        IdGrammar(num_paths=3, path_after=(11,), triggers=tuple(range(12, 26))),
        {"block_size": 16, "presence_penalty": 1.5, "frequency_penalty": 0.75},
        id="penalties",
    ),
    pytest.param(
        IdGrammar(num_paths=2, join_mode="reprefill"),
        {"block_size": 16, "presence_penalty": 1.5, "frequency_penalty": 0.75},
        id="penalties-reprefill",
    ),
    pytest.param(
        IdGrammar(num_paths=3, join_end=tuple(range(40, 70))),
        {"block_size": 16, "min_tokens": 130},
        id="min-tokens",
    ),
    pytest.param(
        IdGrammar(num_paths=2, join_end=tuple(range(40, 70)), at_start=True),
        {"block_size": 16, "depth": 1, "ignore_eos": True},
        id="ignore-eos",
    ),
    pytest.param(
        IdGrammar(num_paths=4),
        {"block_size": 16, "max_num_batched_tokens": 24, "max_num_seqs": 3},
        id="chunked-prefill-few-seats",
    ),
]


@pytest.mark.parametrize(("grammar", "engine_args"), CASES)
def test_greedy_equals_dense_mask(
    grammar: IdGrammar,
    engine_args: dict[str, Any],
    hf_model: Any,
    make_engine: Any,
    tmp_path: Path,
) -> None:
    from vllm import SamplingParams

    args = {**engine_args}
    depth = args.pop("depth", 2)
    asked_for = [name for name in args if name.endswith(("_penalty", "_tokens", "_eos"))]
    sampling = {name: args.pop(name) for name in asked_for if not name.startswith("max_num")}
    engine = make_engine(options={"profile": grammar.write(tmp_path)}, **args)
    budget = Budget(max_tokens=150, path_tokens=24, max_depth=depth, **sampling)
    asked = prompts(5, seed=grammar.num_paths)
    params = SamplingParams(
        max_tokens=budget.max_tokens,
        temperature=0,
        extra_args={"pt_path_tokens": 24, "pt_max_depth": depth},
        **sampling,
    )
    plain = SamplingParams(max_tokens=60, temperature=0, extra_args={"parallel_think": "off"})
    answers = [Oracle(hf_model, grammar, budget).answer(prompt) for prompt in asked]
    assert sum(answer.num_forks for answer in answers) >= 3, "the grammar was hardly exercised"
    alone = engine.generate(asked, plain)
    outputs = engine.generate([*asked, *asked], [params] * 5 + [plain] * 5)
    for output, answer in zip(outputs[:5], answers, strict=True):
        assert_equal(output, answer, engine.snapshot(output))
    for mixed, single in zip(outputs[5:], alone, strict=True):
        assert mixed.outputs[0].token_ids == single.outputs[0].token_ids
    engine.assert_all_blocks_free()


@pytest.mark.parametrize("num_steps", [2, 5])
def test_forced_preemption_changes_no_key(
    num_steps: int, hf_model: Any, make_engine: Any, tmp_path: Path
) -> None:
    """INV-2 with somebody preempted every few steps: K/V is computed again as it was."""
    from vllm import SamplingParams

    grammar = IdGrammar(num_paths=3, path_after=(11,), fork_after=(10,))
    engine = make_engine(options={"profile": grammar.write(tmp_path)}, block_size=16)
    engine.preempt_every(num_steps)
    asked = prompts(4, seed=num_steps)
    params = SamplingParams(max_tokens=90, temperature=0, extra_args={"pt_path_tokens": 16})
    budget = Budget(max_tokens=90, path_tokens=16)
    for output in engine.generate(asked, params):
        answer = Oracle(hf_model, grammar, budget).answer(output.prompt_token_ids)
        assert_equal(output, answer, engine.snapshot(output))
    engine.assert_all_blocks_free()


def test_evicted_groups_are_replayed(hf_model: Any, make_engine: Any, tmp_path: Path) -> None:
    """A reset (sleep, new weights) takes all K/V: groups compute it again, node by node."""
    from vllm import SamplingParams

    grammar = IdGrammar(num_paths=3)
    engine = make_engine(options={"profile": grammar.write(tmp_path)}, block_size=16)
    scheduler, schedule = engine.scheduler, engine.scheduler.schedule
    replays, steps = [], itertools.count(1)
    evict = scheduler.preemption.evict

    def resetting(*args: Any, **kwargs: Any) -> Any:
        if next(steps) % 12 == 0:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    scheduler.preemption.evict = lambda state: (replays.append(state), evict(state))
    scheduler.schedule = resetting
    params = SamplingParams(max_tokens=110, temperature=0, extra_args={"pt_max_depth": 1})
    budget = Budget(max_tokens=110, max_depth=1)
    for output in engine.generate(prompts(6, seed=3), params):
        answer = Oracle(hf_model, grammar, budget).answer(output.prompt_token_ids)
        assert_equal(output, answer, engine.snapshot(output))
    assert replays, "no group held anything when the reset came"
    engine.assert_all_blocks_free()
