"""Rows of few query tokens in Triton: work is cut along the keys, and shared spans are read once.

Every row's entries are cut into spans of one length, which depends on shapes only. A program sums
one span for a tile of rows that share it (or for one row), and a second kernel merges each line's
spans by log-sum-exp in their order: the same input gives the same bits.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from attention_kernels.plan import SegmentPlan
from attention_kernels.prefix_sharing import shared_spans, tile_sizes
from attention_kernels.provider import Problem
from attention_kernels.triton.tile import LN_2, MIN_EDGE, attend_entries, tile_edge

SPAN_KEYS = (1024, 512, 256, 128)
PARTIAL_BYTES = 256 << 20
MERGED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a GPU decides. `python -m tests.bench.attention --tune` measures other values.

    num_programs: fewest programs for which spans are made shorter. shared_lines: most lines of a
    tile of several rows, a power of two. narrow, wide: launch options (stages of the software
    pipeline, warps) of programs for few lines, and for as many as `shared_lines`.
    """

    # Two on each of an H200's 132 multiprocessors.
    num_programs: int = 264
    shared_lines: int = 64
    # Block ids are fetched ahead of keys and values, which halves how far these are ahead: with 3
    # or 4 stages their next tile is fetched while no product is computed, from 5 on beside it
    # (as Triton 3.9 compiles it).
    narrow: tuple[int, int] = (3, 4)
    wide: tuple[int, int] = (3, 4)


tuning = Tuning()


@dataclass(frozen=True, slots=True)
class Cut:
    """How a problem is cut: spans of `span` entries, rows of up to `short_tokens` tokens."""

    span: int
    num_spans: int
    short_tokens: int
    lines: int  # of a row: its tokens times the query heads per KV head
    shared_lines: int  # of a tile of several rows


@dataclass(frozen=True, eq=False)
class _Places:
    """Which rows stand together in each span; both [C, R] int32."""

    row: torch.Tensor
    tile: torch.Tensor  # rows of the tile that begins at this place, 0 inside a tile


def choose(problem: Problem) -> Cut | None:
    """How to cut, from shapes and the plan's host-side bounds; None: not at all."""
    plan, (num_rows, width) = problem.plan, problem.plan.blocks.shape
    num_kv_heads = problem.key_cache.shape[2]
    group = problem.query.shape[1] // num_kv_heads
    short = max(1, MIN_EDGE // group)
    if plan.max_query_len is not None:
        short = max(1, min(short, plan.max_query_len))
    line_bytes = num_rows * num_kv_heads * short * group * problem.query.shape[2] * 4
    for keys in SPAN_KEYS:
        span = max(1, keys // plan.block_size)
        num_spans = -(-width // span)
        enough = num_spans * num_kv_heads >= tuning.num_programs
        too_many = 2 * num_spans * line_bytes > PARTIAL_BYTES
        if enough or too_many or keys == SPAN_KEYS[-1]:
            break
    if num_spans < 2 or num_spans * line_bytes > PARTIAL_BYTES:
        return None
    return Cut(span, num_spans, short, short * group, min(tuning.shared_lines, tile_edge(problem)))


def worth_sharing(group: int) -> int:
    """The fewest rows that share a span for which it is read once.

    Not measured on a GPU yet: from two rows on the bytes read are halved at least, and a tile has
    16 lines whether one row fills them or more do.
    """
    return 2


def _places(plan: SegmentPlan, cut: Cut, group: int) -> _Places:
    """The order and tiles of rows in each span; rows alone where nothing is shared."""
    shared = None
    if plan.share:
        shared = shared_spans(plan, cut.span, cut.short_tokens, any_shift=True)
    num_rows = plan.num_rows
    row = torch.arange(num_rows, device=plan.device, dtype=torch.int32)
    row = row.repeat(cut.num_spans, 1)
    tile = torch.ones_like(row)
    if shared is not None:
        full = len(shared.row)
        row[:full] = shared.row
        most = max(1, cut.shared_lines // cut.lines)
        tile[:full] = tile_sizes(shared, most, worth_sharing(group))
    return _Places(row, tile)


@triton.jit
def _span_kernel(
    query, sums, tops, totals, place_row, place_tile, num_entries_of, query_start, query_len,
    row_mask, num_rows, num_spans, span, short_tokens, least, most,
    key, value, blocks, first, count, bound,
    shift_index, cos, sin, visible_index, visible_offset, visible_limit,
    entry_stride, shift_width, visible_width, scale_log2, key_scale, value_scale,
    query_token, query_head, query_dim,
    key_block, key_slot, key_head, key_dim,
    value_block, value_slot, value_head, value_dim, key_scale_head, value_scale_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, SLOTS: tl.constexpr, ENTRIES: tl.constexpr, PARTS: tl.constexpr,
    LINES: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr, NEOX: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_VISIBLE: tl.constexpr, WIDEN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Sums of one span for the tile that begins at a place, if it has least .. most rows."""
    place, number, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place_row, place_tile = place_row + number * num_rows, place_tile + number * num_rows
    size = tl.load(place_tile + place)
    if (size < least) | (size > most):
        return
    row = tl.load(place_row + place)
    length = tl.load(query_len + row)
    if HAS_MASK:
        length = tl.where(tl.load(row_mask + row) != 0, length, 0)
    num_entries = tl.load(num_entries_of + row)
    if (length == 0) | (length > short_tokens) | (number * span >= num_entries):
        return
    m, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    member, line = m // LINES, m % LINES
    in_tile = member < size
    its_row = tl.load(place_row + place + member, mask=in_tile, other=0)
    token, head = line // GROUP, kv_head * GROUP + line % GROUP
    is_row = in_tile & (token < tl.load(query_len + its_row, mask=in_tile, other=0))
    start = tl.load(query_start + its_row, mask=in_tile, other=0)
    stop = tl.minimum((number + 1) * span, num_entries)
    top, total, acc = attend_entries(
        query, start + token, token, head, is_row, row, its_row, kv_head, number * span, stop,
        key, value, blocks, first, count, bound,
        shift_index, cos, sin, visible_index, visible_offset, visible_limit,
        entry_stride, shift_width, visible_width, scale_log2, key_scale, value_scale,
        query_token, query_head, query_dim,
        key_block, key_slot, key_head, key_dim,
        value_block, value_slot, value_head, value_dim, key_scale_head, value_scale_head,
        HEAD_DIM, DIM, SLOTS, ENTRIES, PARTS, BLOCK_M, HALF, NEOX, HAS_SHIFT, HAS_VISIBLE, WIDEN,
        HAS_SCALE,
    )  # fmt: skip
    at = ((its_row.to(tl.int64) * num_spans + number) * NUM_KV_HEADS + kv_head) * LINES + line
    tl.store(tops + at, top, mask=is_row)
    tl.store(totals + at, total, mask=is_row)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(sums + at[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)


@triton.jit
def _merge_kernel(
    sums, tops, totals, out, lse, num_entries_of, query_start, query_len, row_mask,
    num_spans, span, short_tokens, out_token, out_head, out_dim,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    LINES: tl.constexpr, AT_ONCE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Merges the spans of one line, AT_ONCE at a time in their order."""
    row, line, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token, head = line // GROUP, kv_head * GROUP + line % GROUP
    length = tl.load(query_len + row)
    if HAS_MASK:
        length = tl.where(tl.load(row_mask + row) != 0, length, 0)
    if (token >= length) | (length > short_tokens):
        return
    live = (tl.load(num_entries_of + row) + span - 1) // span
    dims, some = tl.arange(0, DIM), tl.arange(0, AT_ONCE)
    top = float("-inf")
    base = row.to(tl.int64) * num_spans
    for number in range(0, live, AT_ONCE):
        at = ((base + number + some) * NUM_KV_HEADS + kv_head) * LINES + line
        its = tl.load(tops + at, mask=number + some < live, other=float("-inf"))
        top = tl.maximum(top, tl.max(its, axis=0))
    total = 0.0
    acc = tl.zeros([DIM], tl.float32)
    for number in range(0, live, AT_ONCE):
        is_live = number + some < live
        at = ((base + number + some) * NUM_KV_HEADS + kv_head) * LINES + line
        its = tl.load(tops + at, mask=is_live, other=float("-inf"))
        weight = tl.where(its == float("-inf"), 0.0, tl.exp2(its - top))
        total += tl.sum(weight * tl.load(totals + at, mask=is_live, other=0.0), axis=0)
        mask = is_live[:, None] & (dims < HEAD_DIM)[None, :]
        part = tl.load(sums + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        acc += tl.sum(part * weight[:, None], axis=0)
    nothing = total == 0.0
    acc = tl.where(nothing, 0.0, acc / tl.where(nothing, 1.0, total))
    place = (tl.load(query_start + row) + token).to(tl.int64)
    to = out + place * out_token + head * out_head + dims * out_dim
    tl.store(to, acc.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
    log_sum = (top + tl.log2(tl.where(nothing, 1.0, total))) * LN_2
    tl.store(lse + place * (NUM_KV_HEADS * GROUP) + head, tl.where(nothing, float("-inf"), log_sum))


def _widths(plan: SegmentPlan, cut: Cut) -> list[tuple[int, int, int, tuple[int, int]]]:
    """(fewest rows, most rows, lines, launch options) of each launch of the span kernel."""
    lines = max(MIN_EDGE, triton.next_power_of_2(cut.lines))
    most = lines // cut.lines
    narrow = [(1, most, lines, tuning.narrow)]
    if not plan.share or plan.num_rows < 2 or cut.shared_lines // cut.lines <= most:
        return narrow
    return [*narrow, (most + 1, plan.num_rows, cut.shared_lines, tuning.wide)]


def attend(
    problem: Problem, cut: Cut, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Rows of up to `cut.short_tokens` query tokens."""
    plan, num_kv_heads = problem.plan, constants["NUM_KV_HEADS"]
    places = plan.memo(("triton", cut), lambda: _places(plan, cut, constants["GROUP"]))
    shape = (plan.num_rows, cut.num_spans, num_kv_heads, cut.lines)
    sums = problem.lse.new_empty((*shape, problem.query.shape[2]))
    tops, totals = problem.lse.new_empty(shape), problem.lse.new_empty(shape)
    mask = plan.blocks if plan.row_mask is None else plan.row_mask.view(torch.uint8)
    has_mask = plan.row_mask is not None
    for least, most, block_m, (num_stages, num_warps) in _widths(plan, cut):
        _span_kernel[(plan.num_rows, cut.num_spans, num_kv_heads)](
            problem.query, sums, tops, totals, places.row, places.tile, plan.num_entries,
            plan.query_start, plan.query_len, mask, plan.num_rows, cut.num_spans, cut.span,
            cut.short_tokens, least, most, *arguments,
            LINES=cut.lines, BLOCK_M=block_m, HAS_MASK=has_mask, **constants,
            num_stages=num_stages, num_warps=num_warps,
        )  # fmt: skip
    _merge_kernel[(plan.num_rows, cut.lines, num_kv_heads)](
        sums, tops, totals, problem.out, problem.lse, plan.num_entries, plan.query_start,
        plan.query_len, mask, cut.num_spans, cut.span, cut.short_tokens, *problem.out.stride(),
        LINES=cut.lines, AT_ONCE=MERGED_AT_ONCE, HAS_MASK=has_mask,
        **{name: constants[name] for name in ("NUM_KV_HEADS", "GROUP", "HEAD_DIM", "DIM")},
    )  # fmt: skip
