"""INV-2 with thought embeddings: tokens and K/V equal a dense forward that adds them to K and V."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.oracle import Budget, Oracle, assert_equal, prompts
from tests.support.tiny import IdGrammar, write_vectors

GRAMMAR = IdGrammar(at_start=True, num_tags=8, path_after=(11,))


def engine_of(make_engine: Any, folder: Path, **kwargs: Any) -> Any:
    options = {"profile": GRAMMAR.write(folder), "max_paths": 16, **kwargs}
    return make_engine(options=options, block_size=16)


def params_of(**extra: Any) -> Any:
    from vllm import SamplingParams

    args = {"pt_path_tokens": 14, "pt_summary_tokens": 20, **extra}
    return SamplingParams(max_tokens=300, temperature=0, extra_args=args)


def test_paths_think_with_their_own_embedding(
    hf_model: Any, make_engine: Any, tmp_path: Path
) -> None:
    file = tmp_path / "thoughts.safetensors"
    vectors = write_vectors(file)
    engine = engine_of(make_engine, tmp_path, thought_embeddings=str(file))
    for num_paths, termination in ((1, "all"), (2, "first"), (8, "half"), (12, "all")):
        (prompt,) = prompts(1, seed=num_paths)
        grammar = replace(GRAMMAR, num_paths=num_paths)
        share = {"first": 0.0, "half": 0.5, "all": 1.0}[termination]
        budget = Budget(300, path_tokens=14, summary_tokens=20, termination=share)
        answer = Oracle(hf_model, grammar, budget, vectors).answer(prompt)
        params = params_of(pt_num_paths=num_paths, pt_termination=termination)
        (output,) = engine.generate([prompt], params)
        assert_equal(output, answer, engine.snapshot(output))
        assert output.kv_transfer_params["parallel_think"]["reused_tags"] == max(0, num_paths - 8)
    engine.assert_all_blocks_free()


def test_embeddings_survive_preemption(hf_model: Any, make_engine: Any, tmp_path: Path) -> None:
    """Mixed with plain requests, which keep their own K/V."""
    file = tmp_path / "thoughts.safetensors"
    vectors = write_vectors(file)
    engine = engine_of(make_engine, tmp_path, thought_embeddings=str(file))
    asked = prompts(3, seed=9)
    off = params_of(parallel_think="off")
    off.extra_args, off.max_tokens = {"parallel_think": "off"}, 30
    alone = engine.generate(asked, off)
    engine.preempt_every(4)
    budget = Budget(300, path_tokens=14, summary_tokens=20)
    outputs = engine.generate([*asked, *asked], [params_of(pt_num_paths=3)] * 3 + [off] * 3)
    for output in outputs[:3]:
        grammar = replace(GRAMMAR, num_paths=3)
        answer = Oracle(hf_model, grammar, budget, vectors).answer(output.prompt_token_ids)
        assert_equal(output, answer, engine.snapshot(output))
    for mixed, single in zip(outputs[3:], alone, strict=True):
        assert mixed.outputs[0].token_ids == single.outputs[0].token_ids
    engine.assert_all_blocks_free()


def test_zero_vectors_change_no_bit(make_engine: Any, tmp_path: Path) -> None:
    file = tmp_path / "zeros.safetensors"
    write_vectors(file, scale=0.0)
    snapshots = []
    for kwargs in ({}, {"thought_embeddings": str(file)}):
        engine = engine_of(make_engine, tmp_path, **kwargs)
        (output,) = engine.generate(prompts(1, seed=4), params_of(pt_num_paths=4))
        snapshots.append(engine.snapshot(output))
    plain, zeros = snapshots
    assert plain.tokens == zeros.tokens
    for name in ("keys", "values"):
        for ours, theirs in zip(getattr(plain, name), getattr(zeros, name), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda file: None, "there is no such file"),
        (lambda file: file.write_bytes(b"no"), "not a safetensors file"),
        (lambda file: write_other(file, "other", 2, 64), "expected a tensor 'thought_embeddings'"),
        (lambda file: write_other(file, "thought_embeddings", 3, 64), "shape [paths, 2, 64]"),
        (lambda file: write_other(file, "thought_embeddings", 2, 32), "found [4, 2, 32]"),
    ],
)
def test_files_that_do_not_fit_are_refused(make: Any, says: str, tmp_path: Path) -> None:
    from vllm_parallel_think.attention.thought_embeddings import ThoughtShape, check_file
    from vllm_parallel_think.core.errors import OptionError

    file = tmp_path / "vectors.safetensors"
    make(file)
    with pytest.raises(OptionError) as refused:
        check_file(str(file), ThoughtShape(num_layers=2, num_kv_heads=2, head_dim=32))
    assert says in str(refused.value)


def write_other(file: Path, name: str, num_layers: int, width: int) -> None:
    """Write a file that holds something else."""
    from safetensors.torch import save_file

    save_file({name: torch.zeros(4, num_layers, width)}, file)


@pytest.mark.parametrize(
    ("dtype", "fits"),
    [
        (torch.float32, True),
        (torch.float16, True),
        (torch.bfloat16, True),
        (torch.float8_e4m3fn, False),
        (torch.int64, False),
        (torch.bool, False),
    ],
    ids=str,
)
def test_only_floating_point_vectors_of_two_bytes_and_more_are_taken(
    dtype: torch.dtype, fits: bool, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from vllm_parallel_think.attention.thought_embeddings import ThoughtShape, check_file
    from vllm_parallel_think.core.errors import OptionError

    file = tmp_path / "vectors.safetensors"
    save_file({"thought_embeddings": torch.zeros(4, 2, 64).to(dtype)}, file)
    shape = ThoughtShape(num_layers=2, num_kv_heads=2, head_dim=32)
    if fits:
        assert check_file(str(file), shape) == 4
        return
    with pytest.raises(OptionError, match="must be of type F64, F32, F16, BF16, found"):
        check_file(str(file), shape)


def test_vectors_must_be_finite() -> None:
    from vllm_parallel_think.attention.thought_embeddings import ThoughtEmbeddings
    from vllm_parallel_think.core.errors import OptionError

    with pytest.raises(OptionError, match="finite"):
        ThoughtEmbeddings(torch.full((1, 2, 2, 32), float("nan")), rotary=None)


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 16])
def test_rotation_is_that_of_vllm(is_neox_style: bool, rotary_dim: int) -> None:
    """RoPE(k + t) = RoPE(k) + what is added, for whole and partial rotation in both styles."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from vllm_parallel_think.attention.thought_embeddings import ThoughtEmbeddings

    random = torch.Generator().manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(32, rotary_dim, 128, 10000.0, is_neox_style, torch.float32)
    vectors = torch.randn(3, 1, 2, 32, generator=random)
    thoughts = ThoughtEmbeddings(vectors, rotary)
    ids, positions = torch.tensor([0, 2, 1, 3]), torch.tensor([5, 90, 0, 127])
    key = torch.randn(4, 2, 32, generator=random)
    chosen = torch.cat([torch.zeros(1, 2, 32), vectors[:, 0]])[ids]

    def turned(key: torch.Tensor) -> torch.Tensor:
        query = torch.zeros(4, 64)
        return rotary.forward_native(positions, query, key.reshape(4, 64).clone())[1].view(4, 2, 32)

    thoughts.begin_step(ids, positions)
    added, value = thoughts.added(0, turned(key), key)
    torch.testing.assert_close(added, turned(key + chosen), rtol=0, atol=1e-5)
    torch.testing.assert_close(value, key + chosen)
    thoughts.end_step()
    assert thoughts.added(0, key, key) == (key, key)
