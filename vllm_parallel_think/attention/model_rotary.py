"""How the served model rotates queries and keys, read off its layers."""

from __future__ import annotations

from typing import Any

import torch

from attention_kernels import Rotary


def rotary_embeddings(model: torch.nn.Module) -> list[Any]:
    """Return vLLM's rotary embeddings of a model; layers that rotate alike share one."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    return [module for module in model.modules() if isinstance(module, RotaryEmbeddingBase)]


def rotary_of(embedding: Any) -> Rotary:
    """Return how one of vLLM's rotary embeddings rotates.

    The frequencies are read off the angle at position 1, computed anew in float32 as vLLM does at
    load: whatever scaling the model has is in them, and YaRN's factor of the amplitude is not.
    """
    cos, sin = embedding._compute_cos_sin_cache()[1].double().chunk(2)
    inv_freq = torch.atan2(sin, cos).cpu()
    return Rotary(inv_freq, 2 * len(inv_freq), bool(embedding.is_neox_style))


def common_rotary(model: torch.nn.Module) -> Rotary | None:
    """Return how a model rotates, or ``None`` if its layers do not rotate all alike."""
    found: list[Rotary] = []
    for embedding in rotary_embeddings(model):
        rotary = rotary_of(embedding)
        if not any(_same(rotary, other) for other in found):
            found.append(rotary)
    return found[0] if len(found) == 1 else None


def _same(one: Rotary, other: Rotary) -> bool:
    return (
        one.is_neox_style == other.is_neox_style
        and one.rotary_dim == other.rotary_dim
        and torch.equal(one.inv_freq, other.inv_freq)
    )
