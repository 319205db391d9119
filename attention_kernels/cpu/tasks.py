"""Cuts a batch into tasks for the compiled kernel.

A row whose query tokens fit one tile is cut along its keys into spans of fixed length, so its
result depends neither on the number of threads nor on the other rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from attention_kernels.cpu import job
from attention_kernels.plan import Int32Array, SegmentPlan
from attention_kernels.prefix_sharing import shared_spans

TILE_LINES = 32  # query tokens times heads per KV head, of one row
SHARED_LINES = 48  # of rows that share a span
SPAN_KEYS = 256


@dataclass(frozen=True, eq=False)
class Tasks:
    """One line of `table` per task, see the columns in `job`."""

    table: Int32Array
    members: Int32Array  # rows of the tasks, side by side
    row_partials: Int32Array  # [R, 2] first partial of a row and their number
    num_partials: int
    partial_tokens: int  # most query tokens of a row that has partials
    task_tokens: int  # most query tokens of a task


def span_entries(block_size: int) -> int:
    """Return the entries of a span."""
    return max(1, SPAN_KEYS // block_size)


def cut(plan: SegmentPlan, group: int) -> Tasks:
    """Cut a batch into tasks. group: query heads per KV head."""
    query_len, num_entries = plan.query_len.numpy(), plan.num_entries.numpy()
    tile_tokens, span = max(1, TILE_LINES // group), span_entries(plan.block_size)
    live = query_len > 0
    if plan.row_mask is not None:
        live = live & plan.row_mask.numpy()
    split = live & (query_len <= tile_tokens) & (num_entries > span)
    spans = np.where(split, -(-num_entries // span), 0)
    whole = _whole_tasks(live & ~split, query_len, num_entries, tile_tokens)
    row_partials = np.stack([np.cumsum(spans) - spans, spans], axis=1).astype(np.int32)
    row, number, begins = _spans(plan, spans, span, tile_tokens, group)
    first = np.flatnonzero(begins)
    members = np.diff(np.append(first, len(row)))
    table = np.zeros((len(first), job.TASK_COLUMNS), dtype=np.int32)
    leader, number = row[first], number[first]
    table[:, job.FIRST_MEMBER] = first
    table[:, job.NUM_MEMBERS] = members
    table[:, job.STOP_TOKEN] = tile_tokens
    table[:, job.ENTRY] = number * span
    table[:, job.STOP_ENTRY] = np.minimum((number + 1) * span, num_entries[leader])
    table[:, job.SPAN] = number
    whole[:, job.FIRST_MEMBER] += len(row)
    rows_of_whole = np.flatnonzero(live & ~split)
    return Tasks(
        table=np.concatenate([whole, table]),
        members=np.concatenate([row, rows_of_whole]).astype(np.int32),
        row_partials=row_partials,
        num_partials=int(spans.sum()),
        partial_tokens=int(query_len[split].max(initial=0)),
        task_tokens=tile_tokens + SHARED_LINES // group,
    )


def _whole_tasks(
    rows: npt.NDArray[np.bool_], query_len: Int32Array, num_entries: Int32Array, tile_tokens: int
) -> Int32Array:
    """Tasks over all entries: the tiles of rows that are not cut along their keys."""
    chosen = np.flatnonzero(rows)
    tiles = -(-query_len[chosen] // tile_tokens)
    place = np.repeat(np.arange(len(chosen)), tiles)
    tile = np.arange(len(place)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    table = np.zeros((len(place), job.TASK_COLUMNS), dtype=np.int32)
    table[:, job.FIRST_MEMBER] = place
    table[:, job.NUM_MEMBERS] = 1
    table[:, job.TOKEN] = tile * tile_tokens
    table[:, job.STOP_TOKEN] = np.minimum((tile + 1) * tile_tokens, query_len[chosen][place])
    table[:, job.STOP_ENTRY] = num_entries[chosen][place]
    table[:, job.SPAN] = -1
    return table


def _spans(
    plan: SegmentPlan, spans: npt.NDArray[np.int64], span: int, tile_tokens: int, group: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The spans of all rows that are cut, those of one task side by side.

    Returns, for each, its row, its number in the row, and whether it is the first of its task.
    """
    most = int(spans.max(initial=0))
    row = np.tile(np.arange(plan.num_rows), (most, 1))
    same = np.zeros(row.shape, dtype=np.bool_)
    shared = None
    if plan.share and most:
        # A member's queries are turned for itself: only what is read must be equal.
        shared = shared_spans(plan, span, tile_tokens, torch.from_numpy(spans > 0), any_shift=True)
    if shared is not None:
        full = min(most, len(shared.row))
        row[:full], same[:full] = shared.row[:full].numpy(), shared.same[:full].numpy()
    number = np.repeat(np.arange(most), plan.num_rows)
    row, same = row.ravel(), same.ravel()
    exists = number < spans[row]
    row, number, same = row[exists], number[exists], same[exists]
    lines = plan.query_len.numpy()[row] * group
    return row, number, _first_of_tasks(~same, lines, worth_sharing(group))


def worth_sharing(group: int) -> int:
    """The fewest rows that share a span for which it is read once.

    group: query heads per KV head. Time of rows apart over time of rows together, measured with
    64 own tokens a row (`python -m tests.bench.attention --gate`, 2 cores with AVX-512): two rows
    gain from one shared span of 256 keys on (1.07 to 1.15 at groups of 1, 3 and 7), but eight
    heads fill the tiles of one row already, and two rows of them gain nothing (0.95 to 1.06).
    Whatever is decided, the results are the same to the bit.
    """
    return 2 if group < 8 else 3


def _first_of_tasks(
    starts: npt.NDArray[np.bool_], lines: npt.NDArray[np.int64], least: int
) -> npt.NDArray[np.bool_]:
    """Cuts groups of rows that begin at `starts` into tasks of about SHARED_LINES lines each.

    Groups of fewer than `least` rows are taken apart.
    """
    if not len(starts):
        return starts
    sizes = np.diff(np.append(np.flatnonzero(starts), len(starts)))
    starts = starts | (np.repeat(sizes, sizes) < least)
    group, first = np.cumsum(starts) - 1, np.flatnonzero(starts)
    before = np.cumsum(lines) - lines
    total = np.add.reduceat(lines, first)
    tasks = -(-total // SHARED_LINES)
    task = (before - before[first][group]) * tasks[group] // total[group]
    begins: npt.NDArray[np.bool_] = starts | (np.diff(task, prepend=-1) != 0)
    return begins
