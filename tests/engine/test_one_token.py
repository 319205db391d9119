"""Requests for one token are left alone: a client's, and those that vLLM makes by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from tests.support.tiny import IdGrammar

PROMPT = [40, 41, 42, 43]


def beams(engine: Any) -> list[tuple[list[int], float]]:
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    (output,) = engine.llm.beam_search([{"prompt_token_ids": PROMPT}], params)
    return [(beam.tokens, beam.cum_logprob) for beam in output.sequences]


def test_one_token_is_sampled(make_engine: Callable[..., Any], tmp_path: Path) -> None:
    """The default profile forks behind every prompt: its first token would be a forced one."""
    engine = make_engine(options={"profile": IdGrammar(at_start=True).write(tmp_path)})
    off = {"parallel_think": "off"}
    one = SamplingParams(max_tokens=1, temperature=0, logprobs=3)
    plain = SamplingParams(max_tokens=1, temperature=0, logprobs=3, extra_args=off)
    longer = SamplingParams(max_tokens=12, temperature=0, logprobs=3)
    left, alone, branched = engine.generate([PROMPT] * 3, [one, plain, longer])
    assert left.outputs[0].logprobs == alone.outputs[0].logprobs
    assert left.outputs[0].logprobs[0][left.outputs[0].token_ids[0]].logprob < 0
    assert left.kv_transfer_params is None
    assert branched.kv_transfer_params["parallel_think"]["forks"] == 1

    forced = branched.outputs[0].logprobs[0]
    own = branched.outputs[0].token_ids[0]
    assert len(forced) == 3
    assert forced[own].logprob == 0
    assert {entry.logprob for token, entry in forced.items() if token != own} == {float("-inf")}
    assert sorted(entry.rank for entry in forced.values()) == [1, 2, 3]

    found = beams(engine)
    engine.assert_all_blocks_free()
    expected = beams(make_engine(options={"profile": "off"}))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx(
        [score for _, score in expected], abs=1e-4
    )
    assert all(score < 0 for _, score in found)
