"""Both model runners have one face; the samplers that it patches are vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock_v2

from vllm_parallel_think.judge import rejection_sampler_v1, rejection_sampler_v2
from vllm_parallel_think.worker.model_runner import ModelRunnerV1, ModelRunnerV2, model_runner


def made(kind: type, **values: Any) -> Any:
    """An object of a class of vLLM's without what its constructor needs."""
    instance = kind.__new__(kind)
    vars(instance).update(values)
    return instance


def runner_v1(**more: Any) -> Any:
    batch = SimpleNamespace(req_ids=["a", "b"])
    return SimpleNamespace(input_batch=batch, sampler=Sampler(), **more)


def runner_v2(**more: Any) -> Any:
    return SimpleNamespace(req_states=SimpleNamespace(index_to_req_id={3: "a", 1: "b"}), **more)


def test_which_runner() -> None:
    v1, v2 = model_runner(runner_v1()), model_runner(runner_v2())
    assert type(v1) is ModelRunnerV1 and v1.verification is rejection_sampler_v1
    assert type(v2) is ModelRunnerV2 and v2.verification is rejection_sampler_v2


def test_rows_of_requests() -> None:
    metadata: Any = SimpleNamespace(req_idx=torch.tensor([1, 3]))
    assert model_runner(runner_v1()).row_ids()(metadata) == ["a", "b"]
    assert model_runner(runner_v2()).row_ids()(metadata) == ["b", "a"]


def test_draft_models() -> None:
    layer, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    drafter, speculator = SimpleNamespace(model=layer), SimpleNamespace(model=other)
    assert model_runner(runner_v1(drafter=drafter)).draft_model is layer
    assert model_runner(runner_v2(speculator=speculator)).draft_model is other
    for runner in (runner_v1(), runner_v2(speculator=None), runner_v1(drafter=SimpleNamespace())):
        assert model_runner(runner).draft_model is None


def test_written_tokens_are_prepended_in_v1() -> None:
    stock = runner_v1(rejection_sampler=RejectionSampler(Sampler()))
    seen: list[Any] = []
    stock.sampler.apply_penalties = lambda logits, sampling_metadata, output_token_ids: seen.append(
        output_token_ids
    )
    written = {"a": [7]}
    model_runner(stock).count_written(written)
    stock.sampler.apply_penalties(None, SimpleNamespace(no_penalties=False), [[1], [2]])
    stock.sampler.apply_penalties(None, SimpleNamespace(no_penalties=True), [[1], [2]])
    assert seen == [[[7, 1], [2]], [[1], [2]]]
    assert "apply_penalties" in vars(stock.rejection_sampler)


def test_written_tokens_are_counted_in_v2() -> None:
    state = made(PenaltiesState, _new_penalties_reqs=[], device=torch.device("cpu"))
    stock = runner_v2(sampler=SimpleNamespace(penalties_state=state))
    model_runner(stock).count_written({})
    assert "apply_staged_writes" in vars(state)
    model_runner(runner_v2(sampler=None)).count_written({})


def test_a_verifier_is_installed_in_either() -> None:
    verifier: Any = object()
    stock = runner_v1(rejection_sampler=RejectionSampler(Sampler()))
    rejection_sampler_v1.install(stock, verifier)
    assert type(stock.rejection_sampler) is rejection_sampler_v1.JudgeRejectionSampler
    assert stock.rejection_sampler.runner is stock
    sampler = made(SamplerV2, sampling_states=made(SamplingStates))
    stock = runner_v2(rejection_sampler=made(stock_v2.RejectionSampler, sampler=sampler))
    rejection_sampler_v2.install(stock, verifier)
    assert type(stock.rejection_sampler) is rejection_sampler_v2.JudgeRejectionSamplerV2
    assert stock.rejection_sampler.verifier is verifier
