"""A seed's answer does not depend on how a prompt was cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tests.support.tiny import IdGrammar
from vllm_parallel_think.worker import cpu_worker

LONG = [40 + i % 50 for i in range(150)]
SHORT = [40, 41, 42]


def sampled(seed: int | None, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True, **more)


@pytest.mark.parametrize("at_start", [False, True], ids=["plain", "paths"])
def test_a_chunked_prompt_with_a_seed(
    make_engine: Callable[..., Any], tmp_path: Path, at_start: bool
) -> None:
    """In one batch: rows that decode with a seed, rows without one, and prompts in parts."""
    profile = "off"
    if at_start:
        profile = IdGrammar(at_start=True).write(tmp_path)
    options = {"profile": profile}
    prompts = [SHORT, LONG, LONG, [*LONG, 7]]
    params = [sampled(3), sampled(1), sampled(1), sampled(None)]
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 48}
    chunked = make_engine(options=options, enable_chunked_prefill=True, **limits)
    in_parts = [out.outputs[0].token_ids for out in chunked.generate(prompts, params)]
    chunked.assert_all_blocks_free()
    whole = make_engine(options=options, max_num_batched_tokens=2048)
    at_once = [out.outputs[0].token_ids for out in whole.generate(prompts, params)]
    assert in_parts[:3] == at_once[:3]
    assert in_parts[1] == in_parts[2]
    assert in_parts[0][:5] != in_parts[1][:5]


def test_the_guard_stands_aside_where_vllm_has_no_such_call() -> None:
    class Mended(CPUModelRunner):
        def _bookkeeping_sync(self, *args: Any) -> Any:
            return super()._bookkeeping_sync(*args)

    assert cpu_worker.rewinds_generators(CPUModelRunner)
    assert not cpu_worker.rewinds_generators(Mended)
    assert not cpu_worker.rewinds_generators(object)
