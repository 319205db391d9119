"""Thought embeddings (ParaThinker, arXiv 2509.04475): a learned vector for every path and layer.

A path's keys and values are ``k' = RoPE(k + t)`` and ``v' = v + t``. Attention backends are given
keys after RoPE; as RoPE is linear, ``RoPE(k + t) = RoPE(k) + RoPE(t)``, and that is what is added
here, right before keys and values go into the cache. Prompt and summary have no vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..core.errors import OptionError, quoted, shortened
from . import step_state
from .model_rotary import rotary_embeddings, rotary_of

TENSOR = "thought_embeddings"

DTYPES = ("F64", "F32", "F16", "BF16")
"""Types whose values are vectors as they stand: FP8 ones lack their scale."""


@dataclass(frozen=True)
class ThoughtShape:
    """What a file of thought embeddings must fit.

    Attributes:
        num_layers: Attention layers of the model.
        num_kv_heads: KV heads of the whole model.
        head_dim: Size of a head.

    """

    num_layers: int
    num_kv_heads: int
    head_dim: int


def shape_of(vllm_config: Any) -> ThoughtShape:
    """Return what fits a configured model."""
    model = vllm_config.model_config
    return ThoughtShape(
        model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
    )


def check_file(file: str, shape: ThoughtShape) -> int:
    """Check a file's header against the model; return the number of paths it has vectors for.

    The file holds one tensor ``thought_embeddings``, [paths, layers, KV heads * head size].

    Raises:
        OptionError: Says what is wrong with the file, and what fits.

    """
    where = f"thought_embeddings {quoted(file)}"
    found = dtype = None
    try:
        if not Path(file).is_file():
            raise OptionError(f"{where}: there is no such file")
        with safe_open(file, framework="pt") as opened:
            if TENSOR in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(TENSOR)
                found, dtype = tensor.get_shape(), tensor.get_dtype()
    except SafetensorError as error:
        reason = shortened(str(error), 500)
        raise OptionError(f"{where}: not a safetensors file: {reason}") from None
    except OSError as error:
        raise OptionError(f"{where} cannot be read: {error.strerror}") from None
    wanted = [shape.num_layers, shape.num_kv_heads * shape.head_dim]
    if found is None or len(found) != 3 or found[1:] != wanted or not found[0]:
        raise OptionError(
            f"{where}: expected a tensor {TENSOR!r} of shape [paths, {wanted[0]}, {wanted[1]}] for "
            f"this model, found {found}"
        )
    if dtype not in DTYPES:
        raise OptionError(f"{where}: the tensor must be of type {', '.join(DTYPES)}, found {dtype}")
    return int(found[0])


class ThoughtEmbeddings:
    """The vectors of this worker's layers and heads, and the rotation of the current step."""

    def __init__(self, vectors: torch.Tensor, rotary: Any) -> None:
        """Keep vectors on the model's device.

        Args:
            vectors: [paths, layers, KV heads, head size] of this worker's heads.
            rotary: vLLM's rotary embedding of the model.

        Raises:
            OptionError: A vector is not finite.

        """
        if not torch.isfinite(vectors).all():
            raise OptionError("thought_embeddings: every value must be finite")
        none = torch.zeros_like(vectors[:1])
        self._vectors = torch.cat([none, vectors]).transpose(0, 1).contiguous()
        self._embedding = rotary
        self._rotary = rotary_of(rotary)
        self._ids: torch.Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def begin_step(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Take the paths and positions of a step's tokens, once for all layers.

        Args:
            ids: [T] int64, 0 for tokens of no path.
            positions: [T] int, RoPE positions.

        """
        self._ids = ids
        table = self._embedding.cos_sin_cache[positions.clamp(min=0).long()].float()
        self._cos, self._sin = table[:, None].chunk(2, dim=-1)

    def end_step(self) -> None:
        """Add nothing until the next step begins."""
        self._ids = None

    def added(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values with their paths' vectors.

        Args:
            layer: Number of the layer.
            key: [T or more, KV heads, head size], after RoPE.
            value: Like ``key``.

        """
        if self._ids is None:
            return key, value
        num = self._ids.shape[0]
        vectors = self._vectors[layer][self._ids].float()
        key, value = key.clone(), value.clone()
        rotated = self._rotary.rotate(vectors, self._cos, self._sin)
        key[:num] = (key[:num].float() + rotated).to(key.dtype)
        value[:num] = (value[:num].float() + vectors).to(value.dtype)
        return key, value


def load(file: str, model: torch.nn.Module, shape: ThoughtShape, rank: int, size: int) -> Any:
    """Load this worker's share of a file for a loaded model.

    Args:
        file: The safetensors file, checked by :func:`check_file`.
        model: The model, for its rotary embedding, device and type.
        shape: What the file fits.
        rank: Tensor-parallel rank of this worker.
        size: Tensor-parallel size.

    Raises:
        OptionError: A vector is not finite, or the model has no or several rotary embeddings.

    """
    found = rotary_embeddings(model)
    if len(found) != 1:
        raise OptionError(
            f"thought_embeddings: need a model with one rotary embedding, this one has {len(found)}"
        )
    (rotary,) = found
    with safe_open(file, framework="pt") as opened:
        vectors = opened.get_tensor(TENSOR)
    vectors = vectors.view(len(vectors), shape.num_layers, shape.num_kv_heads, shape.head_dim)
    # With more workers than KV heads, vLLM gives several workers the same head.
    per_worker = max(1, shape.num_kv_heads // size)
    first = rank * shape.num_kv_heads // size
    weight = next(model.parameters())
    vectors = vectors[:, :, first : first + per_worker].to(weight.device, weight.dtype)
    return ThoughtEmbeddings(vectors, rotary)


def with_thoughts(
    layer: Any, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's keys and values as they are to be cached.

    Args:
        layer: vLLM's attention layer.
        key: [T, Hkv, D].
        value: [T, Hkv, D].

    """
    header_tensors = step_state.current()
    if header_tensors is None or header_tensors.thoughts is None:
        return key, value
    # Seconds to import, and the front end reads files of embeddings with this module.
    from vllm.model_executor.models.utils import extract_layer_index

    return header_tensors.thoughts.added(extract_layer_index(layer.layer_name), key, value)
