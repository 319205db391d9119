"""Thought embeddings on their way into the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.models.utils import extract_layer_index

from .. import tables

Added = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def thoughts_of_layer() -> Added:
    """Return what a layer does with keys and values before they are cached.

    Called while the model is built, when vLLM's configuration is at hand.
    """
    vllm_config = get_current_vllm_config_or_none()
    instance = "" if vllm_config is None else vllm_config.instance_id

    def added(
        layer: Any, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        headers = tables.find(instance)
        if headers is None or headers.thoughts is None:
            return key, value
        return headers.thoughts.added(extract_layer_index(layer.layer_name), key, value)

    return added
