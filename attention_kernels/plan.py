"""What each row of a batch attends to, as tensors with one entry per KV block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
Cached = TypeVar("Cached")

INT32_MAX = 2**31 - 1
# Leaves room for adding a slot index without overflow.
ALWAYS_VISIBLE = -(2**30)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of KV blocks with a valid length.

    blocks: physical block ids in order. length: valid tokens, counted from `first_slot` of the
    first block. shift: positions by which the row's queries turn for this segment, one number or
    one per query token. visible: per query token, how many leading tokens of the segment it sees.
    No engine sets `first_slot` and `visible` yet: K/V compression keeps parts of blocks with them.
    """

    blocks: tuple[int, ...]
    length: int
    first_slot: int = 0
    shift: int | tuple[int, ...] = 0
    visible: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """`query_len` query tokens; they are the last tokens of the last segment, causal in it."""

    query_len: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class ShiftTable:
    """shift of query token t for entry e of row r: values[index[r, e], t]. Vector 0 is zero."""

    index: torch.Tensor  # [R, E] int32
    values: torch.Tensor  # [S, max_query_len] int32
    first: tuple[int, int]  # (row, shift) of one shifted segment, for messages


@dataclass(frozen=True, eq=False)
class VisibleTable:
    """Slot i of entry e is visible to t only if offset[r, e] + i < values[index[r, e], t].

    Vector 0 lets everything through.
    """

    index: torch.Tensor  # [R, E] int32
    offset: torch.Tensor  # [R, E] int32, token offset in the segment of the entry's first slot
    values: torch.Tensor  # [S, max_query_len] int32


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """The segments of a batch, one entry per KV block, padded to [R, E].

    Slots first .. first + count - 1 of an entry's block hold keys; slot first + i is visible to
    the row's query token t iff bound + i <= t (and the visible table, if any, agrees).
    """

    blocks: torch.Tensor  # [R, E] int32, physical block id
    first: torch.Tensor  # [R, E] int32, first valid slot
    count: torch.Tensor  # [R, E] int32, valid slots, may be 0
    bound: torch.Tensor  # [R, E] int32
    num_entries: torch.Tensor  # [R] int32
    query_start: torch.Tensor  # [R] int32, first token of the row in `query`
    query_len: torch.Tensor  # [R] int32
    block_size: int
    num_tokens: int | None = None  # None: only the device knows
    max_block: tuple[int, int] | None = None  # (row, block id); None: unknown or no blocks
    shifts: ShiftTable | None = None
    visible: VisibleTable | None = None
    row_mask: torch.Tensor | None = None  # [R] bool; rows with False are not computed
    max_query_len: int | None = None  # most query tokens of a row; None: only the device knows
    share: bool = True  # rows that read the same blocks may read them together
    _memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_rows(self) -> int:
        return self.blocks.shape[0]

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def memo(self, key: Any, make: Callable[[], Cached]) -> Cached:
        """make() once per plan and key: a plan serves every layer of a step."""
        if key not in self._memo:
            self._memo[key] = make()
        found: Cached = self._memo[key]
        return found

    @classmethod
    def build(
        cls,
        rows: Sequence[Row],
        block_size: int = 16,
        device: torch.device | str = "cpu",
        share: bool = True,
    ) -> SegmentPlan:
        """The plan of `rows`, whose query tokens are packed in this order.

        block_size: tokens per KV block. share: rows whose leading segments name the same block ids
        in the same order may read them together, where that pays. Raises ValueError naming the row
        and the value at fault.
        """
        if block_size <= 0:
            raise ValueError(f"block_size must be positive, got {block_size}")
        for index, row in enumerate(rows):
            _check_row(index, row, block_size)
        return _Builder(rows, block_size).plan(torch.device(device), share)

    @classmethod
    def from_block_table(
        cls,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        fill: torch.Tensor,
        *,
        block_size: int,
        row_mask: torch.Tensor | None = None,
        max_query_len: int | None = None,
        share: bool = True,
    ) -> SegmentPlan:
        """The plan of a batch given as a block table; tensor operations only, no host sync.

        block_table [R, B] int, seq_lens [R] int, query_start_loc [R + 1] int, fill [num_blocks]
        int (valid slots per physical block), row_mask [R] bool, all on one device. Key j of row r
        lies in slot j % block_size of block_table[r, j // block_size]; it exists iff that slot is
        below the block's fill, and query token t sees it iff j <= seq_len - query_len + t.

        share: rows of the plan whose block tables begin with the same ids may read them together,
        where that pays. Who shares what is found on the device, by tensor operations whose number
        depends on shapes only. Their cost grows with B: pass the columns that the longest row
        reaches, `block_table[:, :ceil(max_seq_len / block_size)]`, where the host knows a bound.
        max_query_len: a bound on the query tokens of a row, where the host knows one; a GPU then
        leaves out the launch for long rows if there are none.
        Raises ValueError for shapes that do not fit.
        """
        num_rows, width = block_table.shape
        if tuple(seq_lens.shape) != (num_rows,):
            raise ValueError(f"seq_lens must be [{num_rows}], got {list(seq_lens.shape)}")
        if tuple(query_start_loc.shape) != (num_rows + 1,):
            raise ValueError(
                f"query_start_loc must be [{num_rows + 1}], got {list(query_start_loc.shape)}"
            )
        if row_mask is not None and tuple(row_mask.shape) != (num_rows,):
            raise ValueError(f"row_mask must be [{num_rows}], got {list(row_mask.shape)}")
        starts = query_start_loc.to(torch.int32)
        seq_lens = seq_lens.to(torch.int32)[:, None]
        query_len = starts[1:] - starts[:-1]
        begin = torch.arange(width, dtype=torch.int32, device=block_table.device) * block_size
        live = begin < seq_lens
        # Kernels take rows as contiguous, which a view of a wider table is not.
        blocks = torch.where(live, block_table, 0).to(torch.int32).contiguous()
        left = seq_lens - begin
        count = torch.minimum(fill[blocks.long()].to(torch.int32), left).clamp_(0, block_size)
        return cls(
            blocks=blocks,
            first=torch.zeros_like(blocks),
            count=torch.where(live, count, 0),
            bound=begin - seq_lens + query_len[:, None],
            num_entries=live.sum(dim=1, dtype=torch.int32),
            query_start=starts[:-1].contiguous(),
            query_len=query_len,
            block_size=block_size,
            row_mask=None if row_mask is None else row_mask.to(torch.bool),
            max_query_len=max_query_len,
            share=share,
        )


def _check_row(index: int, row: Row, block_size: int) -> None:
    if row.query_len < 0:
        raise ValueError(f"row {index}: query_len {row.query_len} is negative")
    if row.query_len and not row.segments:
        raise ValueError(f"row {index}: no segment holds its {row.query_len} query tokens")
    for segment in row.segments:
        _check_segment(index, row.query_len, segment, block_size)
    if row.segments and row.segments[-1].length < row.query_len:
        raise ValueError(
            f"row {index}: last segment has length {row.segments[-1].length}, "
            f"less than query_len {row.query_len}"
        )


def _check_segment(index: int, query_len: int, segment: Segment, block_size: int) -> None:
    if segment.length < 0:
        raise ValueError(f"row {index}: segment length {segment.length} is negative")
    if not 0 <= segment.first_slot < block_size:
        raise ValueError(
            f"row {index}: first_slot {segment.first_slot} is outside 0..{block_size - 1}"
        )
    room = max(0, len(segment.blocks) * block_size - segment.first_slot)
    if segment.length > room:
        raise ValueError(
            f"row {index}: segment length {segment.length} exceeds the {room} slots of its blocks"
        )
    for block in segment.blocks:
        if not 0 <= block <= INT32_MAX:
            raise ValueError(f"row {index}: block id {block} is negative or beyond int32")
    if isinstance(segment.shift, tuple) and len(segment.shift) != query_len:
        raise ValueError(
            f"row {index}: shift has {len(segment.shift)} values for {query_len} query tokens"
        )
    for shift in segment.shift if isinstance(segment.shift, tuple) else (segment.shift,):
        if abs(shift) > INT32_MAX:
            raise ValueError(f"row {index}: shift {shift} is beyond int32")
    if segment.visible is None:
        return
    if len(segment.visible) != query_len:
        raise ValueError(
            f"row {index}: visible has {len(segment.visible)} values for {query_len} query tokens"
        )
    for visible in segment.visible:
        if visible < 0:
            raise ValueError(f"row {index}: visible {visible} is negative")


class _Builder:
    """Fills the padded arrays of a plan from checked rows."""

    def __init__(self, rows: Sequence[Row], block_size: int) -> None:
        self.rows = rows
        self.block_size = block_size
        self.num_entries = np.array(
            [sum(self._span(s) for s in row.segments) for row in rows], dtype=np.int32
        )
        self.query_len = np.array([row.query_len for row in rows], dtype=np.int32)
        self.shape = (len(rows), max(1, int(self.num_entries.max(initial=0))))
        self.blocks, self.first, self.count, self.bound, self.offset = (
            np.zeros(self.shape, dtype=np.int32) for _ in range(5)
        )
        self.shift_index = np.zeros(self.shape, dtype=np.int32)
        self.visible_index = np.zeros(self.shape, dtype=np.int32)
        self.shift_vectors: list[Int32Array] = []
        self.shift_numbers: dict[bytes, int] = {}
        self.visible_vectors: list[Int32Array] = []
        self.first_shift: tuple[int, int] = (0, 0)
        self.max_block: tuple[int, int] | None = None
        for index, row in enumerate(rows):
            self._fill_row(index, row)

    def _span(self, segment: Segment) -> int:
        """Number of blocks a segment touches; it may list spare ones behind them."""
        if segment.length == 0:
            return 0
        return -(-(segment.first_slot + segment.length) // self.block_size)

    def _fill_row(self, index: int, row: Row) -> None:
        start = 0
        for number, segment in enumerate(row.segments, start=1):
            span = self._span(segment)
            if span == 0:
                continue
            at = (index, slice(start, start + span))
            begin = np.arange(span, dtype=np.int64) * self.block_size - segment.first_slot
            offset = np.maximum(begin, 0)
            blocks = np.array(segment.blocks[:span], dtype=np.int32)
            self.blocks[at] = blocks
            self.first[at] = offset - begin
            self.count[at] = np.minimum(begin + self.block_size, segment.length) - offset
            self.offset[at] = offset
            self.bound[at] = ALWAYS_VISIBLE
            if number == len(row.segments):
                self.bound[at] = offset - segment.length + row.query_len
            self._add_vectors(index, at, row.query_len, segment)
            top = int(blocks.max())
            if self.max_block is None or top > self.max_block[1]:
                self.max_block = (index, top)
            start += span

    def _add_vectors(
        self, index: int, at: tuple[int, slice], query_len: int, segment: Segment
    ) -> None:
        shift = np.broadcast_to(np.array(segment.shift, dtype=np.int32), (query_len,))
        if shift.any():
            if not self.shift_vectors:
                self.first_shift = (index, int(shift[shift != 0][0]))
            # Equal shifts get equal numbers: rows that turn alike can share.
            key = shift.tobytes()
            if key not in self.shift_numbers:
                self.shift_vectors.append(shift)
                self.shift_numbers[key] = len(self.shift_vectors)
            self.shift_index[at] = self.shift_numbers[key]
        if segment.visible is not None:
            clipped = np.minimum(segment.visible, segment.length).astype(np.int32)
            self.visible_vectors.append(clipped)
            self.visible_index[at] = len(self.visible_vectors)

    def _table(self, vectors: list[Int32Array], default: int) -> Int32Array:
        width = int(self.query_len.max(initial=1))
        table = np.full((len(vectors) + 1, width), default, dtype=np.int32)
        for number, vector in enumerate(vectors, start=1):
            table[number, : len(vector)] = vector
        return table

    def plan(self, device: torch.device, share: bool) -> SegmentPlan:
        def tensor(array: Int32Array) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        shifts = visible = None
        if self.shift_vectors:
            values = tensor(self._table(self.shift_vectors, 0))
            shifts = ShiftTable(tensor(self.shift_index), values, self.first_shift)
        if self.visible_vectors:
            values = tensor(self._table(self.visible_vectors, INT32_MAX))
            visible = VisibleTable(tensor(self.visible_index), tensor(self.offset), values)
        ends = np.cumsum(self.query_len, dtype=np.int32)
        return SegmentPlan(
            blocks=tensor(self.blocks),
            first=tensor(self.first),
            count=tensor(self.count),
            bound=tensor(self.bound),
            num_entries=tensor(self.num_entries),
            query_start=tensor(ends - self.query_len),
            query_len=tensor(self.query_len),
            block_size=self.block_size,
            num_tokens=int(self.query_len.sum()),
            max_block=self.max_block,
            shifts=shifts,
            visible=visible,
            max_query_len=int(self.query_len.max(initial=0)),
            share=share,
        )
