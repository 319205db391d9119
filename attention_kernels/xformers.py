"""xFormers provider: paged gappy masks for the parts of rows, and its merge of partial results.

A part is a run of entries without a hole inside: xFormers' masks let a sequence begin and end
anywhere in its pages, but leave nothing out between. Part n of every row that has one is attended
to in one call, and the calls of a row merge by log-sum-exp. The plan is read on the host, so this
is an independent second opinion and a baseline for benchmarks, not a kernel for an engine's step.
xFormers needs CUDA, fp16 or bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from xformers.ops import fmha
from xformers.ops.fmha.attn_bias import (
    BlockDiagonalCausalWithOffsetGappyKeysMask,
    BlockDiagonalGappyKeysMask,
    PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    PagedBlockDiagonalGappyKeysMask,
)

from attention_kernels.plan import SegmentPlan
from attention_kernels.provider import Problem


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a row's entries: `length` keys from slot `first` of its first block on."""

    row: int
    blocks: tuple[int, ...]
    first: int
    length: int
    shift: int  # vector of the plan's shift table
    causal: bool  # the row's tokens are its last ones


@dataclass(frozen=True, eq=False)
class Call:
    """One call of xFormers: a part of each of some rows."""

    tokens: torch.Tensor  # [M] int64, places in the query
    shifts: torch.Tensor  # [M] int64, vector of the shift table of each
    offsets: torch.Tensor  # [M] int64, number of each in its row
    mask: PagedBlockDiagonalGappyKeysMask


def attend(problem: Problem) -> None:
    """Provider entry point.

    Raises ValueError for what xFormers' masks cannot say or its operators cannot read.
    """
    _check(problem)
    plan = problem.plan
    calls = plan.memo("xformers", lambda: make_calls(plan))
    query, num_kv_heads = problem.query, problem.key_cache.shape[2]
    num_tokens, num_heads, dim = query.shape
    group = num_heads // num_kv_heads
    key, value = (
        cache.reshape(1, -1, num_kv_heads, 1, dim).expand(-1, -1, -1, group, -1)
        for cache in (problem.key_cache, problem.value_cache)
    )
    shape = (len(calls), 1, num_tokens, num_kv_heads, group, dim)
    outs = query.new_zeros(shape)
    sums = problem.lse.new_full((len(calls), 1, num_kv_heads, group, num_tokens), -torch.inf)
    for number, call in enumerate(calls):
        lines = _turned(problem, call).reshape(1, -1, num_kv_heads, group, dim)
        out, lse = partial(lines, key, value, call.mask, problem.scale)
        outs[number, :, call.tokens] = out.to(outs.dtype)
        sums[number, ..., call.tokens] = lse.float()
    if not calls:
        return
    out, lse = merge(outs, sums)
    lse = lse.reshape(num_heads, num_tokens).T
    computed = torch.cat([call.tokens for call in calls]).unique()
    # What sees nothing has weights of 0 / 0.
    out = out.reshape(query.shape).masked_fill((lse == -torch.inf)[..., None], 0.0)
    problem.out[computed] = out[computed].to(problem.out.dtype)
    problem.lse[computed] = lse[computed]


def partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PagedBlockDiagonalGappyKeysMask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [1, M, Hkv, G, D] and lse [1, Hkv, G, M] of query [1, M, Hkv, G, D]."""
    out, lse = fmha.memory_efficient_attention_partial(query, key, value, mask, scale=scale)
    return out, lse


def merge(outs: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out [1, T, Hkv, G, D] and lse [1, Hkv, G, T] of C partial results."""
    out, lse = fmha.merge_attentions(outs, sums)
    assert lse is not None
    return out, lse


def _check(problem: Problem) -> None:
    if problem.query.device.type != "cuda":
        raise ValueError(
            "the xformers provider needs CUDA: xFormers has no paged attention for "
            f"{problem.query.device}; take torch or cpu"
        )
    if problem.scales is not None or problem.key_cache.dtype != problem.query.dtype:
        raise ValueError("the xformers provider takes caches of the query's type without scales")


def make_calls(plan: SegmentPlan) -> list[Call]:
    """The calls that compute a plan; rows without keys are in none.

    Raises ValueError for a plan with `visible`, naming the row.
    """
    parts = [row_parts(plan, row) for row in range(plan.num_rows)]
    some: dict[tuple[int, bool], list[Part]] = {}
    for row in parts:
        for number, part in enumerate(row):
            some.setdefault((number, part.causal), []).append(part)
    return [_call(plan, group) for _, group in sorted(some.items())]


def row_parts(plan: SegmentPlan, row: int) -> list[Part]:
    """The parts of a row, in order."""
    query_len = int(plan.query_len[row])
    if query_len == 0 or (plan.row_mask is not None and not bool(plan.row_mask[row])):
        return []
    stop = int(plan.num_entries[row])
    if plan.visible is not None and bool((plan.visible.index[row, :stop] != 0).any()):
        raise ValueError(f"row {row}: the xformers provider cannot limit what a token sees")
    columns = [getattr(plan, name)[row, :stop].tolist() for name in ("blocks", "first", "count")]
    bounds = plan.bound[row, :stop].tolist()
    shifts = [0] * stop if plan.shifts is None else plan.shifts.index[row, :stop].tolist()
    parts: list[Part] = []
    ends_full = False
    for block, first, count, bound, shift in zip(*columns, bounds, shifts, strict=True):
        if count == 0:
            ends_full = False
            continue
        causal = bound + count > 1
        last = parts[-1] if parts else None
        if last is not None and ends_full and first == 0 and last.shift == shift:
            blocks, length = (*last.blocks, block), last.length + count
            parts[-1] = Part(row, blocks, last.first, length, shift, last.causal or causal)
        else:
            parts.append(Part(row, (block,), first, count, shift, causal))
        ends_full = first + count == plan.block_size
    return parts


def _call(plan: SegmentPlan, parts: list[Part]) -> Call:
    device = plan.device
    lengths = [int(plan.query_len[part.row]) for part in parts]
    starts = [int(plan.query_start[part.row]) for part in parts]
    width = max(len(part.blocks) for part in parts)
    table = torch.zeros(len(parts), width, dtype=torch.int32)
    for place, part in enumerate(parts):
        table[place, : len(part.blocks)] = torch.tensor(part.blocks, dtype=torch.int32)
    room = width * plan.block_size
    causal = parts[0].causal
    # The paged class's own constructor refuses every input (xFormers 0.0.35): by way of a mask
    # over rows that lie one behind the other.
    unpaged = BlockDiagonalCausalWithOffsetGappyKeysMask if causal else BlockDiagonalGappyKeysMask
    mask = unpaged.from_seqlens(
        lengths,
        [*(place * room + part.first for place, part in enumerate(parts)), len(parts) * room],
        [part.length for part in parts],
        device=device,
    ).make_paged(
        table.to(device),
        plan.block_size,
        room,
        PagedBlockDiagonalCausalWithOffsetGappyKeysMask
        if causal
        else PagedBlockDiagonalGappyKeysMask,
    )
    offsets = torch.cat([torch.arange(length) for length in lengths])
    first = torch.tensor(starts).repeat_interleave(torch.tensor(lengths))
    shifts = torch.tensor([part.shift for part in parts])
    return Call(
        tokens=(first + offsets).to(device),
        shifts=shifts.repeat_interleave(torch.tensor(lengths)).to(device),
        offsets=offsets.to(device),
        mask=mask,
    )


def _turned(problem: Problem, call: Call) -> torch.Tensor:
    """[M, Hq, D] query lines of a call, turned by their shifts."""
    lines, rotation = problem.query[call.tokens], problem.rotation
    if rotation is None:
        return lines
    at = (call.shifts, call.offsets)
    turned = rotation.rotary.rotate(
        lines.float(), rotation.cos[at][:, None], rotation.sin[at][:, None]
    )
    return turned.to(lines.dtype)
