"""The one public operation of this package."""

from __future__ import annotations

import torch

from attention_kernels.plan import SegmentPlan
from attention_kernels.provider import KVScales, Problem, Rotation, get_provider
from attention_kernels.rotary import Rotary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of a cache beside the query's own."""


def segmented_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: SegmentPlan,
    *,
    scale: float,
    rotary: Rotary | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    provider: str = "auto",
    out: torch.Tensor | None = None,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(scale * q k^T) v over each row's segments, as one softmax.

    query [T, Hq, D]: the rows' tokens, packed in the plan's order. key_cache and value_cache
    [num_blocks, block_size, Hkv, D] are logical shapes; any strides will do. Query head h reads
    KV head h // (Hq / Hkv). Slots outside the plan's entries are never used, whatever they hold;
    slots inside must be finite. fp32, bf16 or fp16, with fp32 accumulation.

    Caches may be fp8 (e4m3fn or e5m2) instead of the query's type. A key is then the cached value
    times key_scale, a value that times value_scale: fp32 tensors [] or [Hkv] on the caches' device,
    one where they are None. The cpu provider takes neither fp8 nor scales.

    Returns out [T, Hq, D] (the argument, if given) and lse [T, Hq] fp32: the natural logarithm of
    the sum of exp(scores), None unless return_lse. A token that sees nothing gets zeros and -inf.
    Rows outside the plan's row_mask keep what `out` held (zeros in a new `out`, and lse -inf).

    Raises ValueError for arguments that do not fit each other or the plan. Block ids and the
    token count are checked for plans made by `build`, whose host-side values are known.
    """
    _check_tensors(query, key_cache, value_cache, plan, out)
    scales = KVScales.of(key_scale, value_scale, key_cache)
    rotation = _rotation(plan, rotary, query.shape[2])
    attend = get_provider(provider, query.device)
    if out is None:
        out = query.new_zeros(query.shape)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if return_lse:
        lse.fill_(-torch.inf)
    if query.numel() and plan.num_rows:
        attend(
            Problem(query, key_cache, value_cache, plan, float(scale), rotation, out, lse, scales)
        )
    return out, lse if return_lse else None


def _rotation(plan: SegmentPlan, rotary: Rotary | None, head_dim: int) -> Rotation | None:
    shifts = plan.shifts
    if shifts is None:
        return None
    if rotary is None:
        row, shift = shifts.first
        raise ValueError(f"row {row}: shift {shift} needs a rotary")
    if rotary.rotary_dim > head_dim:
        raise ValueError(f"rotary_dim {rotary.rotary_dim} exceeds head dim {head_dim}")
    return plan.memo(rotary, lambda: Rotation(rotary, *rotary.tables(shifts.values)))


def _check_tensors(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: SegmentPlan,
    out: torch.Tensor | None,
) -> None:
    if query.dim() != 3 or key_cache.dim() != 4 or value_cache.dim() != 4:
        raise ValueError(
            "expected query [T, Hq, D] and caches [num_blocks, block_size, Hkv, D], got "
            f"{list(query.shape)}, {list(key_cache.shape)}, {list(value_cache.shape)}"
        )
    if key_cache.shape != value_cache.shape:
        raise ValueError(
            f"key_cache {list(key_cache.shape)} and value_cache {list(value_cache.shape)} differ"
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"dtype {query.dtype} is not one of {DTYPES}")
    same = query.dtype == key_cache.dtype or key_cache.dtype in CACHE_DTYPES
    if not same or key_cache.dtype != value_cache.dtype:
        raise ValueError(
            f"dtypes of query, key and value differ: {query.dtype}, {key_cache.dtype}, "
            f"{value_cache.dtype}; caches are of the query's own or one of {CACHE_DTYPES}"
        )
    num_blocks, block_size, num_kv_heads, head_dim = key_cache.shape
    if query.shape[2] != head_dim:
        raise ValueError(f"head dim of query is {query.shape[2]}, of the cache {head_dim}")
    if num_kv_heads == 0 or query.shape[1] == 0 or query.shape[1] % num_kv_heads:
        raise ValueError(f"{query.shape[1]} query heads over {num_kv_heads} KV heads")
    if block_size != plan.block_size:
        raise ValueError(f"block size of the cache is {block_size}, of the plan {plan.block_size}")
    devices = {query.device, key_cache.device, value_cache.device, plan.device}
    if len(devices) > 1:
        raise ValueError(f"tensors and plan are on several devices: {sorted(map(str, devices))}")
    if plan.num_tokens is not None and plan.num_tokens != query.shape[0]:
        raise ValueError(f"the plan's rows have {plan.num_tokens} tokens, query {query.shape[0]}")
    if plan.max_block is not None and plan.max_block[1] >= num_blocks:
        row, block = plan.max_block
        raise ValueError(f"row {row}: block id {block} is outside the cache of {num_blocks} blocks")
    if out is not None and (out.shape, out.dtype, out.device) != (
        query.shape,
        query.dtype,
        query.device,
    ):
        raise ValueError(f"out must be like query, got {list(out.shape)} {out.dtype} {out.device}")
