"""Plans for rows that see long lists of runs, made anew for every step of a decode batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention_kernels.plan import ALWAYS_VISIBLE, Int32Array, SegmentPlan, ShiftTable


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """A row of whole runs: each starts at its first block's slot 0, and turns all tokens alike.

    query_start, query_len: the row's tokens in `query`. blocks: physical block ids of each run,
    no spare ones. lengths: tokens of each run, positive; the last run ends with the row's own
    tokens. shifts: positions by which the row's queries turn for each run.
    """

    query_start: int
    query_len: int
    blocks: Sequence[Int32Array]
    lengths: Sequence[int]
    shifts: Sequence[int]


def pack_rows(
    rows: Sequence[PackedRow], block_size: int, device: torch.device | str = "cpu"
) -> SegmentPlan:
    """The plan that `SegmentPlan.build` makes of such rows, without a Python step per block.

    Nothing is checked: for callers that made the runs themselves.
    """
    spans = [np.array([len(blocks) for blocks in row.blocks]) for row in rows]
    num_entries = np.array([span.sum() for span in spans], dtype=np.int32)
    shape = (len(rows), max(1, int(num_entries.max(initial=0))))
    blocks, count, bound, index = (np.zeros(shape, dtype=np.int32) for _ in range(4))
    numbers: dict[int, int] = {0: 0}
    first_shift = (0, 0)
    for at, (row, span) in enumerate(zip(rows, spans, strict=True)):
        size = num_entries[at]
        blocks[at, :size] = np.concatenate(row.blocks)
        count[at, :size] = block_size
        ends = span.cumsum()
        # Only the last block of a run can be partly filled.
        count[at, ends - 1] = np.array(row.lengths) - (span - 1) * block_size
        bound[at, :size] = ALWAYS_VISIBLE
        own = np.arange(span[-1], dtype=np.int32) * block_size
        bound[at, size - span[-1] : size] = own - row.lengths[-1] + row.query_len
        for shift in row.shifts:
            if shift and len(numbers) == 1:
                first_shift = (at, shift)
            numbers.setdefault(shift, len(numbers))
        index[at, :size] = np.repeat([numbers[shift] for shift in row.shifts], span)
    query_len = np.array([row.query_len for row in rows], dtype=np.int32)
    width = int(query_len.max(initial=1))

    def tensor(array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    shifts = None
    if len(numbers) > 1:
        vectors = np.array(list(numbers), dtype=np.int32)[:, None]
        table = np.repeat(vectors, width, axis=1)
        shifts = ShiftTable(tensor(index), tensor(table), first_shift)
    return SegmentPlan(
        blocks=tensor(blocks),
        first=tensor(np.zeros(shape, dtype=np.int32)),
        count=tensor(count),
        bound=tensor(bound),
        num_entries=tensor(num_entries),
        query_start=tensor(np.array([row.query_start for row in rows], dtype=np.int32)),
        query_len=tensor(query_len),
        block_size=block_size,
        shifts=shifts,
        max_query_len=width,
    )
