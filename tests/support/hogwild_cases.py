"""Recipes of bare token ids for the tiny model, and the comparison with the dense oracle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.support.hogwild_oracle import Dense, HogwildOracle, Plan, Written

TOLERANCE = 1e-3
"""Of K/V whose values go up to 10; a token too much or too little moves them by 0.1 and more."""

NUMBER = 100
NAMES = (41, 42, 43, 44)
OTHERS, OWN = (50, 51, 52), (53, 54, 55, 56)
QUESTION, FORCED, FOUND = (60, 61, 62), (63, 64), (65, 66, 67)
CLOSE, MARKS = (68, 69), (170, 180, 190, 200)
ENDS = tuple(range(10, 34, 2))


def start_of(worker: int, number: int) -> list[int]:
    """The tokens of "{name} {number} w45"."""
    return [NAMES[worker], NUMBER + number, 45]


def write_recipe(folder: Path, **changes: Any) -> str:
    """Write a recipe of bare token ids; return its path."""
    values: dict[str, Any] = {
        "names": [f"w{name}" for name in NAMES],
        "num_workers": 2,
        "step": "{name} {number} w45",
        "others": list(OTHERS),
        "own": list(OWN),
        "end": list(ENDS),
        **changes,
    }
    every, found = values.pop("every", 0), values.pop("found", list(FOUND))
    marks = [f"w{token}" for token in values.pop("marks", ())]
    workers = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    path = folder / "workers.toml"
    path.write_text(
        f"""
name = "workers"
summary = "token ids"
[workers]
{workers}
[check]
every = {every}
text = {json.dumps(list(QUESTION))}
[answer]
marks = {json.dumps(marks)}
found = {json.dumps(found)}
forced = {json.dumps(list(FORCED))}
max_tokens = 8
""",
        "utf-8",
    )
    return str(path)


def plan_of(num_workers: int, layout: str, **changes: Any) -> Plan:
    """What the recipe says, for the oracle."""
    values: dict[str, Any] = {
        "worker_tokens": 40,
        "ends": frozenset(ENDS),
        "others": OTHERS,
        "own": OWN,
        "steps": start_of,
        "question": QUESTION,
        "found": FOUND,
        "forced": FORCED,
    }
    return Plan(num_workers, layout, **{**values, **changes})


def params(plan: Plan, written: Written, **extra: Any) -> Any:
    """Sampling parameters for the same answer, as long as the oracle's."""
    from vllm import SamplingParams

    options = {
        "parallel_think": "workers",
        "pt_layout": plan.layout,
        "pt_worker_tokens": plan.worker_tokens,
        "pt_check_every": plan.check_every,
    }
    if plan.num_workers > 1:
        options["pt_num_workers"] = plan.num_workers
    return SamplingParams(
        temperature=0,
        max_tokens=plan.max_tokens,
        min_tokens=plan.min_tokens,
        ignore_eos=plan.ignore_eos,
        logprobs=0,
        extra_args={**options, **extra},
    )


def prompts(count: int) -> list[list[int]]:
    """Prompts of odd lengths."""
    rng = torch.Generator().manual_seed(3)
    return [
        torch.randint(70, 99, (length,), generator=rng).tolist()
        for length in (19, 45, 33, 70, 27, 64)[:count]
    ]


def assert_same(engine: Any, output: Any, oracle: HogwildOracle) -> None:
    """Compare an answer's tokens, log-probabilities and K/V with the oracle's."""
    written, got = oracle.written, output.outputs[0]
    # The oracle stops behind a few tokens of an answer that was found; the engine goes on.
    text = list(got.token_ids)
    assert (text if written.by == "budget" else text[: len(written.visible)]) == written.visible
    sampled = [
        step[token].logprob
        for token, step in zip(got.token_ids, got.logprobs, strict=True)
        if step[token].logprob != 0.0  # forced tokens have probability 1
    ]
    expected = torch.tensor(written.log_probs)
    assert torch.allclose(torch.tensor(sampled[: len(expected)]), expected, atol=2e-3)
    assert_same_kv(engine, output, oracle.dense, written)
    assert output.kv_transfer_params["parallel_think"]["fallbacks"] == {}


def assert_same_kv(engine: Any, output: Any, dense: Dense, written: Written) -> None:
    """Compare what lay in the cache, layer by layer."""
    snapshot = engine.snapshot(output)
    keys, values = torch.cat(snapshot.keys, 1), torch.cat(snapshot.values, 1)
    ids = [i for step in written.history for i in step]
    places = [at for step in written.history for at in range(len(step))]
    assert keys.shape[1] == len(ids)
    for layer in range(keys.shape[0]):
        wanted = dense.rotate(torch.stack([dense.keys[i][layer] for i in ids]), places)
        assert (keys[layer] - wanted).abs().max() < TOLERANCE
        wanted = torch.stack([dense.values[i][layer] for i in ids])
        assert (values[layer] - wanted).abs().max() < TOLERANCE


def count_swaps(engine: Any) -> Counter[str]:
    """Count copies to the host and back."""
    counts: Counter[str] = Counter()
    copies = engine.worker._copies
    apply = copies.apply

    def counting(swaps: Any) -> None:
        for one in swaps:
            counts["out" if one.out else "in" if one.blocks else "dropped"] += 1
        apply(swaps)

    copies.apply = counting
    return counts
