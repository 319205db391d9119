"""What both Triton kernels do with a tile of query lines: load it, and sum over entries."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_kernels.provider import Problem

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# Smallest tile edge that tl.dot takes.
MIN_EDGE = 16
MAX_EDGE = 64


def padded_dim(head_dim: int) -> int:
    """The edge of a tile along the head dim."""
    return max(MIN_EDGE, triton.next_power_of_2(head_dim))


def tile_edge(problem: Problem) -> int:
    """The most lines of a tile, and the most keys of a step of its loop: 16 to 64.

    With these, kernels fit the 99 KB of shared memory that a program can have on compute
    capabilities 8.6 and 8.9 (CUDA C++ Programming Guide, technical specifications per compute
    capability), and almost nothing of a tile spills from registers: test_compiled.py counts.
    """
    plan, edge = problem.plan, MAX_EDGE * 128 // padded_dim(problem.query.shape[2])
    if problem.query.dtype == torch.float32:
        edge //= 4  # products that keep all bits run outside the tensor cores
    if plan.shifts is not None or plan.visible is not None:
        edge //= 2  # lines are held as they are and turned, or each key's limit beside them
    return min(MAX_EDGE, max(MIN_EDGE, edge))


@triton.jit
def _turn(query, partner, cos, sin, vector, token, dims, mask, shift_width, HALF: tl.constexpr,
          NEOX: tl.constexpr):  # fmt: skip
    """The tile [M, D], each line turned by its own vector; `partner` holds dims' other halves."""
    if NEOX:
        pair, is_left = dims % HALF, dims < HALF
    else:
        pair, is_left = dims // 2, dims % 2 == 0
    at = (vector * shift_width + token)[:, None] * HALF + pair[None, :]
    turning = mask & (dims < 2 * HALF)[None, :]
    c = tl.load(cos + at, mask=turning, other=1.0)
    s = tl.load(sin + at, mask=turning, other=0.0)
    s = tl.where(is_left[None, :], -s, s)
    return (query.to(tl.float32) * c + partner.to(tl.float32) * s).to(query.dtype)


@triton.jit
def attend_entries(
    query, place, token, head, is_row, row, its_row, kv_head, begin, stop,
    key, value, blocks, first, count, bound,
    shift_index, cos, sin, visible_index, visible_offset, visible_limit,
    entry_stride, shift_width, visible_width, scale_log2, key_scale, value_scale,
    query_token, query_head, query_dim,
    key_block, key_slot, key_head, key_dim,
    value_block, value_slot, value_head, value_dim, key_scale_head, value_scale_head,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr, ENTRIES: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr, NEOX: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_VISIBLE: tl.constexpr, WIDEN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """(largest score [M] in units of log 2, sum of weights [M], weighted values [M, D]) of a tile.

    A line of the tile is query token `place`, number `token` of row `its_row`, at `head`. Entries
    begin .. stop - 1 are those of `row`; its bounds hold for all lines, its shifts do not. A step
    of the loop takes ENTRIES entries, or one of the PARTS of an entry's SLOTS.
    """
    dims = tl.arange(0, DIM)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    query += place.to(tl.int64)[:, None] * query_token + head[:, None] * query_head
    plain = tl.load(query + dims[None, :] * query_dim, mask=mask, other=0.0)
    if WIDEN:
        plain = plain.to(tl.float32)
    turned, partner, turned_by = plain, plain, tl.zeros([BLOCK_M], tl.int32)
    if HAS_SHIFT:
        if NEOX:
            other = tl.where(dims < HALF, dims + HALF, dims - HALF)
        else:
            other = dims + 1 - 2 * (dims % 2)
        turning = mask & (dims < 2 * HALF)[None, :]
        partner = tl.load(query + other[None, :] * query_dim, mask=turning, other=0.0)
        partner = partner.to(plain.dtype)

    if HAS_SCALE:
        scale_log2 = scale_log2 * tl.load(key_scale + kv_head * key_scale_head)
    blocks, first = blocks + row * entry_stride, first + row * entry_stride
    count, bound = count + row * entry_stride, bound + row * entry_stride
    lane = tl.arange(0, ENTRIES * SLOTS // PARTS)
    last_token = tl.max(tl.where(is_row, token, -1), axis=0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for step in range(begin * PARTS, stop * PARTS, ENTRIES):
        entry = step // PARTS + lane // SLOTS
        slot = step % PARTS * (SLOTS // PARTS) + lane % SLOTS
        in_row = entry < stop
        offset = slot - tl.load(first + entry, mask=in_row, other=0)
        valid = in_row & (offset >= 0) & (offset < tl.load(count + entry, mask=in_row, other=0))
        limit = tl.load(bound + entry, mask=in_row, other=0) + offset
        sees = valid[None, :] & (limit[None, :] <= token[:, None])
        # What no line sees may be a hole: never multiply it, 0 * NaN is NaN.
        seen = valid & (limit <= last_token)
        if HAS_VISIBLE:
            at = row * entry_stride + entry
            vector = tl.load(visible_index + at, mask=in_row, other=0)
            leading = tl.load(
                visible_limit + vector[None, :] * visible_width + token[:, None],
                mask=in_row[None, :] & is_row[:, None], other=0,
            )  # fmt: skip
            inside = tl.load(visible_offset + at, mask=in_row, other=0) + offset
            sees = sees & (inside[None, :] < leading)
            seen = tl.max((sees & is_row[:, None]).to(tl.int32), axis=0) > 0
        if HAS_SHIFT:
            by = tl.load(shift_index + its_row * entry_stride + step // PARTS, mask=is_row, other=0)
            if tl.max((by != turned_by).to(tl.int32), axis=0) > 0:
                turned = _turn(plain, partner, cos, sin, by, token, dims, mask, shift_width,
                               HALF, NEOX)  # fmt: skip
                turned_by = by
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
        # fp8 in the cache; bf16 in the interpreter.
        k, v = k.to(plain.dtype), v.to(plain.dtype)
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
    if HAS_SCALE:
        acc = acc * tl.load(value_scale + kv_head * value_scale_head)
    return top, total, acc
