"""Thought embeddings on their way into the KV cache."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from . import step_state


def with_thoughts(
    layer: Any, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's keys and values as they are to be cached.

    Args:
        layer: vLLM's attention layer.
        key: [T, Hkv, D].
        value: [T, Hkv, D].

    """
    headers = step_state.current()
    if headers is None or headers.thoughts is None:
        return key, value
    return headers.thoughts.added(extract_layer_index(layer.layer_name), key, value)
