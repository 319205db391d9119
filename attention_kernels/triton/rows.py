"""Triton provider: a tile of query lines and a KV head per program, online softmax over entries.

Rows of few tokens are cut along their keys into spans (see shared_spans); the kernel of this file
takes the others, one program per tile of a row. Nothing is read back from the device: grids follow
from shapes, and programs without work return. The row of a program is found by binary search over
the rows' query starts, the scheme of vLLM's unified attention kernel.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from attention_kernels.provider import Problem
from attention_kernels.triton import shared_spans
from attention_kernels.triton.tile import (
    LN_2,
    LOG2_E,
    MIN_EDGE,
    attend_entries,
    padded_dim,
    tile_edge,
)


@triton.jit
def _find_row(query_start, num_rows, tile, BLOCK_Q: tl.constexpr):
    """The row whose tiles include `tile`, when row r's begin at query_start[r] // BLOCK_Q + r."""
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _kernel(
    query, out, lse, num_entries_of, query_start, query_len, row_mask, num_rows, short_tokens,
    out_token, out_head, out_dim,
    key, value, blocks, first, count, bound,
    shift_index, cos, sin, visible_index, visible_offset, visible_limit,
    entry_stride, shift_width, visible_width, scale_log2, key_scale, value_scale,
    query_token, query_head, query_dim,
    key_block, key_slot, key_head, key_dim,
    value_block, value_slot, value_head, value_dim, key_scale_head, value_scale_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOTS: tl.constexpr, ENTRIES: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, HALF: tl.constexpr,
    NEOX: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_VISIBLE: tl.constexpr,
    WIDEN: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = _find_row(query_start, num_rows, tile, BLOCK_Q)
    start, length = tl.load(query_start + row), tl.load(query_len + row)
    begin = (tile - (start // BLOCK_Q + row)) * BLOCK_Q
    if HAS_MASK:
        length = tl.where(tl.load(row_mask + row) != 0, length, 0)
    if length <= short_tokens:
        return
    if begin >= length:
        return
    m, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    token, head = begin + m // GROUP, kv_head * GROUP + m % GROUP
    is_row = (m < BLOCK_Q * GROUP) & (token < length)
    num_entries = tl.load(num_entries_of + row)
    last_token = tl.minimum(begin + BLOCK_Q, length) - 1
    stop = num_entries
    if num_entries > 0:
        # The last segment's bounds grow by a block per entry: those beyond the tile are left out.
        last_bound = tl.load(bound + row * entry_stride + num_entries - 1)
        beyond = tl.maximum(last_bound - last_token, 0)
        stop = num_entries - (beyond + BLOCK_SIZE - 1) // BLOCK_SIZE
    top, total, acc = attend_entries(
        query, start + token, token, head, is_row, row, row + m * 0, kv_head, 0, stop,
        key, value, blocks, first, count, bound,
        shift_index, cos, sin, visible_index, visible_offset, visible_limit,
        entry_stride, shift_width, visible_width, scale_log2, key_scale, value_scale,
        query_token, query_head, query_dim,
        key_block, key_slot, key_head, key_dim,
        value_block, value_slot, value_head, value_dim, key_scale_head, value_scale_head,
        HEAD_DIM, DIM, SLOTS, ENTRIES, PARTS, BLOCK_M, HALF, NEOX, HAS_SHIFT, HAS_VISIBLE, WIDEN,
        HAS_SCALE,
    )  # fmt: skip
    nothing = total == 0.0
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, total)[:, None])
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    out += (start + token).to(tl.int64)[:, None] * out_token + head[:, None] * out_head
    tl.store(out + dims[None, :] * out_dim, acc.to(out.dtype.element_ty), mask=mask)
    log_sum = (top + tl.log2(tl.where(nothing, 1.0, total))) * LN_2
    log_sum = tl.where(nothing, float("-inf"), log_sum)
    tl.store(lse + (start + token) * (NUM_KV_HEADS * GROUP) + head, log_sum, mask=is_row)


def attend(problem: Problem) -> None:
    """Provider entry point; on the CPU only under Triton's interpreter."""
    # The interpreter multiplies the bit patterns of bf16 and truncates when it stores them.
    widen = triton.knobs.runtime.interpret and problem.query.dtype == torch.bfloat16
    target = problem.out
    if widen:
        problem = replace(problem, out=target.float())
    arguments, constants = _arguments(problem), _constants(problem, widen)
    cut = shared_spans.choose(problem)
    if cut is not None:
        shared_spans.attend(problem, cut, arguments, constants)
    most = problem.plan.max_query_len
    if cut is None or most is None or most > cut.short_tokens:
        _attend_long(problem, 0 if cut is None else cut.short_tokens, arguments, constants)
    if widen:
        target.copy_(problem.out)


def _attend_long(
    problem: Problem, short_tokens: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Rows of more than `short_tokens` query tokens, uncut."""
    plan, num_tokens, group = problem.plan, problem.query.shape[0], constants["GROUP"]
    prefill = num_tokens > 4 * plan.num_rows
    block_m = max(tile_edge(problem) if prefill else MIN_EDGE, triton.next_power_of_2(group))
    block_q = block_m // group
    _kernel[(num_tokens // block_q + plan.num_rows, constants["NUM_KV_HEADS"])](
        problem.query, problem.out, problem.lse, plan.num_entries,
        plan.query_start, plan.query_len,
        plan.blocks if plan.row_mask is None else plan.row_mask.view(torch.uint8),
        plan.num_rows, short_tokens, *problem.out.stride(), *arguments,
        BLOCK_SIZE=plan.block_size, BLOCK_M=block_m, BLOCK_Q=block_q,
        HAS_MASK=plan.row_mask is not None, **constants,
    )  # fmt: skip


def _arguments(problem: Problem) -> tuple[Any, ...]:
    """What `attend_entries` takes from `key` to its strides."""
    plan, rotation, scales = problem.plan, problem.rotation, problem.scales
    shifts, visible, unused = plan.shifts, plan.visible, plan.blocks
    return (
        problem.key_cache, problem.value_cache, plan.blocks, plan.first, plan.count, plan.bound,
        unused if shifts is None else shifts.index,
        unused if rotation is None else rotation.cos,
        unused if rotation is None else rotation.sin,
        unused if visible is None else visible.index,
        unused if visible is None else visible.offset,
        unused if visible is None else visible.values,
        plan.blocks.shape[1],
        0 if shifts is None else shifts.values.shape[1],
        0 if visible is None else visible.values.shape[1],
        problem.scale * LOG2_E,
        unused if scales is None else scales.key, unused if scales is None else scales.value,
        *problem.query.stride(), *problem.key_cache.stride(), *problem.value_cache.stride(),
        0 if scales is None else scales.key.stride(0),
        0 if scales is None else scales.value.stride(0),
    )  # fmt: skip


def _constants(problem: Problem, widen: bool) -> dict[str, Any]:
    plan, rotation = problem.plan, problem.rotation
    num_kv_heads, head_dim = problem.key_cache.shape[2:]
    slots = max(MIN_EDGE, triton.next_power_of_2(plan.block_size))
    keys = tile_edge(problem)
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": problem.query.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "DIM": padded_dim(head_dim),
        "SLOTS": slots,
        # A shift belongs to an entry: then a tile is one entry.
        "ENTRIES": 1 if plan.shifts is not None else max(1, keys // slots),
        "PARTS": max(1, slots // keys),
        "HALF": 1 if rotation is None else rotation.rotary.rotary_dim // 2,
        "NEOX": True if rotation is None else rotation.rotary.is_neox_style,
        "HAS_SHIFT": plan.shifts is not None,
        "HAS_VISIBLE": plan.visible is not None,
        "WIDEN": widen,
        "HAS_SCALE": problem.scales is not None,
    }
