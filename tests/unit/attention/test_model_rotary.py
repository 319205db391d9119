"""How a model rotates, read off vLLM's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from vllm_parallel_think.attention.model_rotary import common_rotary, rotary_embeddings, rotary_of


def embedding(base: float = 10000.0, is_neox_style: bool = True, rotary_dim: int = 16) -> Any:
    with set_current_vllm_config(VllmConfig()):
        return RotaryEmbedding(32, rotary_dim, 128, base, is_neox_style, torch.float32)


def model(*embeddings: Any) -> torch.nn.Module:
    """One layer for each embedding."""
    return torch.nn.ModuleList([torch.nn.ModuleList([each]) for each in embeddings])


@pytest.mark.parametrize("is_neox_style", [True, False])
def test_a_rotation_by_the_difference_leads_from_one_position_to_another(
    is_neox_style: bool,
) -> None:
    stock = embedding(is_neox_style=is_neox_style)
    rotary = rotary_of(stock)
    assert (rotary.rotary_dim, rotary.is_neox_style) == (16, is_neox_style)
    key = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))

    def at(position: int) -> torch.Tensor:
        return stock.forward_native(torch.tensor([position]), torch.zeros(1, 32), key.clone())[1]

    moved = rotary.rotate(at(7), *rotary.tables(torch.tensor([90])))
    torch.testing.assert_close(moved, at(97), rtol=0, atol=1e-5)


def test_layers_that_share_or_agree_rotate_alike() -> None:
    shared = embedding()
    assert rotary_embeddings(model(shared, shared)) == [shared]
    assert common_rotary(model(shared, embedding())) is not None


@pytest.mark.parametrize(
    "other", [{"base": 500.0}, {"is_neox_style": False}, {"rotary_dim": 32}], ids=str
)
def test_layers_that_differ_have_no_common_rotation(other: dict[str, Any]) -> None:
    assert common_rotary(model(embedding(), embedding(**other))) is None
    assert common_rotary(model()) is None
