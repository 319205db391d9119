"""What a provider is, and how one is found. A provider is a module with `attend(problem)`."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attention_kernels.plan import SegmentPlan
from attention_kernels.rotary import Rotary

logger = logging.getLogger(__name__)

PROVIDERS = {
    "torch": "attention_kernels.reference",
    "cpu": "attention_kernels.cpu.launch",
    "triton": "attention_kernels.triton.rows",
    "xformers": "attention_kernels.xformers",
}


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of every vector in a plan's shift table."""

    rotary: Rotary
    cos: torch.Tensor  # [S, max_query_len, rotary_dim / 2] fp32
    sin: torch.Tensor


@dataclass(frozen=True, eq=False)
class KVScales:
    """What cached keys and values are multiplied by."""

    key: torch.Tensor  # [Hkv] fp32, any stride
    value: torch.Tensor  # [Hkv] fp32

    @classmethod
    def of(
        cls, key: torch.Tensor | None, value: torch.Tensor | None, cache: torch.Tensor
    ) -> KVScales | None:
        """Scales of a cache [num_blocks, block_size, Hkv, D]; None if there are none.

        Raises ValueError for a shape, type or device that does not fit the cache.
        """
        if key is None and value is None:
            return None
        one = torch.ones((), device=cache.device) if key is None or value is None else None
        num_kv_heads = cache.shape[2]
        for name, scale in (("key_scale", key), ("value_scale", value)):
            if scale is None:
                continue
            if scale.numel() not in (1, num_kv_heads) or scale.dim() > 1:
                raise ValueError(f"{name} must be [] or [{num_kv_heads}], got {list(scale.shape)}")
            if scale.dtype != torch.float32 or scale.device != cache.device:
                raise ValueError(
                    f"{name} must be float32 on {cache.device}, got {scale.dtype} on {scale.device}"
                )
        key, value = (one if scale is None else scale for scale in (key, value))
        assert key is not None and value is not None
        return cls(key.expand(num_kv_heads), value.expand(num_kv_heads))


@dataclass(frozen=True, eq=False)
class Problem:
    """Checked arguments of one call; a provider writes the rows it computes to `out` and `lse`."""

    query: torch.Tensor  # [T, Hq, D]
    key_cache: torch.Tensor  # [num_blocks, block_size, Hkv, D], any strides
    value_cache: torch.Tensor  # [num_blocks, block_size, Hkv, D], any strides
    plan: SegmentPlan
    scale: float
    rotation: Rotation | None  # set iff the plan has shifts
    out: torch.Tensor  # [T, Hq, D], query's dtype
    lse: torch.Tensor  # [T, Hq] fp32, natural logarithm
    scales: KVScales | None = None


Provider = Callable[[Problem], None]


def get_provider(name: str, device: torch.device) -> Provider:
    """The provider called `name`; "auto" picks by device and falls back to torch, logged once.

    Raises ValueError for an unknown name, ImportError if a provider asked for by name cannot be
    loaded (xformers is the project's extra of that name).
    """
    if name == "auto":
        return _auto_provider("triton" if device.type == "cuda" else "cpu")
    if name not in PROVIDERS:
        raise ValueError(f"provider must be auto or one of {sorted(PROVIDERS)}, got {name!r}")
    return _load(name)


@functools.cache
def _load(name: str) -> Provider:
    attend: Provider = importlib.import_module(PROVIDERS[name]).attend
    return attend


@functools.cache
def _auto_provider(name: str) -> Provider:
    try:
        return _load(name)
    except ImportError as error:
        logger.warning("attention provider %r is unavailable, using 'torch': %s", name, error)
        return _load("torch")
