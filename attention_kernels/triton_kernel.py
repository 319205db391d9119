"""Triton provider: one program per tile of query tokens and KV head, online softmax over entries.

The launch reads nothing back from the device. The row of a program is found by binary search over
the rows' query starts, the scheme of vLLM's unified attention kernel.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_kernels.base import Problem

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# Smallest tile edge that tl.dot takes.
MIN_EDGE = 16
PREFILL_ROWS = 64
TILE_KEYS = 64


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
def _turn(query, partner, cos, sin, vector, token, dims, mask, shift_width, HALF: tl.constexpr,
          NEOX: tl.constexpr):  # fmt: skip
    """The query tile [M, D] rotated by a shift vector; `partner` holds each dim's other half."""
    if NEOX:
        pair, is_left = dims % HALF, dims < HALF
    else:
        pair, is_left = dims // 2, dims % 2 == 0
    at = (vector * shift_width + token[:, None]) * HALF + pair[None, :]
    turning = mask & (dims < 2 * HALF)[None, :]
    c = tl.load(cos + at, mask=turning, other=1.0)
    s = tl.load(sin + at, mask=turning, other=0.0)
    s = tl.where(is_left[None, :], -s, s)
    return (query.to(tl.float32) * c + partner.to(tl.float32) * s).to(query.dtype)


@triton.jit
def _kernel(
    query, key, value, out, lse,
    blocks, first, count, bound, num_entries_of, query_start, query_len, row_mask,
    shift_index, cos, sin, visible_index, visible_offset, visible_limit,
    num_rows, entry_stride, shift_width, visible_width, scale_log2,
    query_token, query_head, query_dim, out_token, out_head, out_dim,
    key_block, key_slot, key_head, key_dim,
    value_block, value_slot, value_head, value_dim,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOTS: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, HALF: tl.constexpr, NEOX: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_VISIBLE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = _find_row(query_start, num_rows, tile, BLOCK_Q)
    start, length = tl.load(query_start + row), tl.load(query_len + row)
    begin = (tile - (start // BLOCK_Q + row)) * BLOCK_Q
    if HAS_MASK:
        length = tl.where(tl.load(row_mask + row) != 0, length, 0)
    if begin >= length:
        return
    m, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    token, head = begin + m // GROUP, kv_head * GROUP + m % GROUP
    is_row = (m < BLOCK_Q * GROUP) & (token < length)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    query += (start + token).to(tl.int64)[:, None] * query_token + head[:, None] * query_head
    plain = tl.load(query + dims[None, :] * query_dim, mask=mask, other=0.0)
    if WIDEN:
        plain = plain.to(tl.float32)
    turned, partner, turned_by = plain, plain, 0
    if HAS_SHIFT:
        if NEOX:
            other = tl.where(dims < HALF, dims + HALF, dims - HALF)
        else:
            other = dims + 1 - 2 * (dims % 2)
        turning = mask & (dims < 2 * HALF)[None, :]
        partner = tl.load(query + other[None, :] * query_dim, mask=turning, other=0.0)
        partner = partner.to(plain.dtype)

    blocks, first = blocks + row * entry_stride, first + row * entry_stride
    count, bound = count + row * entry_stride, bound + row * entry_stride
    num_entries = tl.load(num_entries_of + row)
    last_token = tl.minimum(begin + BLOCK_Q, length) - 1
    stop = num_entries
    if num_entries > 0:
        # The last segment's bounds grow by a block per entry: those beyond the tile are left out.
        beyond = tl.maximum(tl.load(bound + num_entries - 1) - last_token, 0)
        stop = num_entries - (beyond + BLOCK_SIZE - 1) // BLOCK_SIZE

    lane = tl.arange(0, ENTRIES * SLOTS)
    slot = lane % SLOTS
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for step in range(0, stop, ENTRIES):
        entry = step + lane // SLOTS
        in_row = entry < stop
        offset = slot - tl.load(first + entry, mask=in_row, other=0)
        valid = in_row & (offset >= 0) & (offset < tl.load(count + entry, mask=in_row, other=0))
        limit = tl.load(bound + entry, mask=in_row, other=0) + offset
        sees = valid[None, :] & is_row[:, None] & (limit[None, :] <= token[:, None])
        if HAS_VISIBLE:
            at = row * entry_stride + entry
            vector = tl.load(visible_index + at, mask=in_row, other=0)
            leading = tl.load(
                visible_limit + vector[None, :] * visible_width + token[:, None],
                mask=in_row[None, :] & is_row[:, None], other=0,
            )  # fmt: skip
            place = tl.load(visible_offset + at, mask=in_row, other=0) + offset
            sees = sees & (place[None, :] < leading)
        if HAS_SHIFT:
            by = tl.load(shift_index + row * entry_stride + step)
            if by != turned_by:
                turned = _turn(plain, partner, cos, sin, by, token, dims, mask, shift_width,
                               HALF, NEOX)  # fmt: skip
                turned_by = by
        # What no row of the tile sees may be a hole: never multiply it, 0 * NaN is NaN.
        seen = tl.max(sees.to(tl.int32), axis=0) > 0
        block = tl.load(blocks + entry, mask=in_row, other=0).to(tl.int64)
        k = tl.load(
            key + (block * key_block + slot * key_slot + kv_head * key_head)[None, :]
            + dims[:, None] * key_dim,
            mask=seen[None, :] & (dims < HEAD_DIM)[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            value + (block * value_block + slot * value_slot + kv_head * value_head)[:, None]
            + dims[None, :] * value_dim,
            mask=seen[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(turned, k, input_precision="ieee") * scale_log2
        scores = tl.where(sees, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A row that has seen nothing yet keeps zero weights instead of inf - inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weights, axis=1)
        acc = acc * keep[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top

    nothing = total == 0.0
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, total)[:, None])
    out += (start + token).to(tl.int64)[:, None] * out_token + head[:, None] * out_head
    tl.store(out + dims[None, :] * out_dim, acc.to(out.dtype.element_ty), mask=mask)
    log_sum = (top + tl.log2(tl.where(nothing, 1.0, total))) * LN_2
    log_sum = tl.where(nothing, float("-inf"), log_sum)
    tl.store(lse + (start + token) * (NUM_KV_HEADS * GROUP) + head, log_sum, mask=is_row)


def attend(problem: Problem) -> None:
    """Provider entry point; on the CPU only under Triton's interpreter."""
    plan, query = problem.plan, problem.query
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = problem.key_cache.shape[2]
    group = num_heads // num_kv_heads
    prefill = num_tokens > 4 * plan.num_rows
    block_m = max(PREFILL_ROWS if prefill else MIN_EDGE, triton.next_power_of_2(group))
    block_q = block_m // group
    slots = max(MIN_EDGE, triton.next_power_of_2(plan.block_size))
    rotation, shifts, visible = problem.rotation, plan.shifts, plan.visible
    unused = plan.blocks
    # The interpreter multiplies the bit patterns of bf16 and truncates when it stores them.
    widen = triton.knobs.runtime.interpret and query.dtype == torch.bfloat16
    out = problem.out.float() if widen else problem.out
    _kernel[(num_tokens // block_q + plan.num_rows, num_kv_heads)](
        query, problem.key_cache, problem.value_cache, out, problem.lse,
        plan.blocks, plan.first, plan.count, plan.bound, plan.num_entries,
        plan.query_start, plan.query_len,
        unused if plan.row_mask is None else plan.row_mask.view(torch.uint8),
        unused if shifts is None else shifts.index,
        unused if rotation is None else rotation.cos,
        unused if rotation is None else rotation.sin,
        unused if visible is None else visible.index,
        unused if visible is None else visible.offset,
        unused if visible is None else visible.values,
        plan.num_rows, plan.blocks.shape[1],
        0 if shifts is None else shifts.values.shape[1],
        0 if visible is None else visible.values.shape[1],
        problem.scale * LOG2_E,
        *query.stride(), *out.stride(),
        *problem.key_cache.stride(), *problem.value_cache.stride(),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim,
        DIM=max(MIN_EDGE, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=plan.block_size, SLOTS=slots,
        # A shift belongs to an entry: then a tile is one entry.
        ENTRIES=1 if shifts is not None else max(1, TILE_KEYS // slots),
        BLOCK_M=block_m, BLOCK_Q=block_q,
        HALF=1 if rotation is None else rotation.rotary.rotary_dim // 2,
        NEOX=True if rotation is None else rotation.rotary.is_neox_style,
        HAS_MASK=plan.row_mask is not None, HAS_SHIFT=shifts is not None,
        HAS_VISIBLE=visible is not None, WIDEN=widen,
    )  # fmt: skip
    if widen:
        problem.out.copy_(out)
