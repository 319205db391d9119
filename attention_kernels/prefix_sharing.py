"""Which rows of a plan read the same blocks: found from the block ids alone.

Every row's entries are cut into spans of fixed length, from its first entry on. Rows share a span
if its entries are equal in all of them (block id, first slot, count, and the shift where a kernel
turns all rows of a span alike) and visible to all their tokens. Trees need no more than this: a
prefix of all, inner prefixes of some, and a conclusion behind several paths are equal spans,
whoever else reads them. Reference counts are never looked at (they say that a block is held, not at
which place it is read).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention_kernels.plan import SegmentPlan


@dataclass(frozen=True, eq=False)
class SharedSpans:
    """For each span an order of the rows in which those that share it stand side by side."""

    row: torch.Tensor  # [C, R] int64, a permutation of the rows for each of C spans
    same: torch.Tensor  # [C, R] bool: this place's row shares the span with the one before it


def shared_spans(
    plan: SegmentPlan,
    span: int,
    max_tokens: int,
    candidates: torch.Tensor | None = None,
    any_shift: bool = False,
) -> SharedSpans | None:
    """The shared spans of `span` entries among rows of 1 to `max_tokens` query tokens.

    candidates: [R] bool, rows to look at; None: all. any_shift: rows that turn their queries by
    different shifts share a span, too. Tensor operations on the plan's device whose number depends
    on shapes only: nothing is read back. Rows are sorted by a hash of what a span
    holds, then neighbours are compared in full: rows of equal hash that differ do not share.
    Returns None where shapes rule out sharing.
    """
    num_rows, num_spans = plan.num_rows, plan.blocks.shape[1] // span
    if num_rows < 2 or num_spans == 0:
        return None

    def cut(entries: torch.Tensor) -> torch.Tensor:
        """[R, E] as [C, R, span]."""
        return entries[:, : num_spans * span].view(num_rows, num_spans, span).transpose(0, 1)

    fields = [plan.blocks, plan.first, plan.count]
    if plan.shifts is not None and not any_shift:
        fields.append(plan.shifts.index)
    held = torch.stack([cut(field) for field in fields], dim=-1).flatten(2)
    eligible = _eligible(plan, span, num_spans, max_tokens)
    # Slot count - 1 of an entry is the last to become visible.
    eligible &= (cut(plan.bound) + cut(plan.count) <= 1).all(dim=-1)
    if plan.visible is not None:
        eligible &= (cut(plan.visible.index) == 0).all(dim=-1)
    if candidates is not None:
        eligible &= candidates
    # Rows that share nothing go last: one between two that share would part them.
    key = torch.where(eligible, _hash(held) >> 1, torch.iinfo(torch.int64).max)
    row = torch.argsort(key, dim=1, stable=True)
    held = held.gather(1, row[:, :, None].expand(held.shape))
    eligible = eligible.gather(1, row)
    same = torch.zeros_like(eligible)
    same[:, 1:] = (held[:, 1:] == held[:, :-1]).all(dim=-1) & eligible[:, 1:] & eligible[:, :-1]
    return SharedSpans(row, same)


def _eligible(plan: SegmentPlan, span: int, num_spans: int, max_tokens: int) -> torch.Tensor:
    """[C, R] bool: the row has all entries of the span, and a legal number of tokens."""
    rows = (plan.query_len > 0) & (plan.query_len <= max_tokens)
    if plan.row_mask is not None:
        rows = rows & plan.row_mask
    ends = torch.arange(1, num_spans + 1, device=plan.device) * span
    return (ends[:, None] <= plan.num_entries) & rows


def _hash(held: torch.Tensor) -> torch.Tensor:
    """[..., n] int32 to [...] int64: a sum with odd multipliers, modulo 2 ** 64."""
    place = torch.arange(held.shape[-1], device=held.device, dtype=torch.int64)
    # The multiplier of Knuth's MMIX generator; odd multiples keep all bits of an id.
    multiplier = (place * 2 + 1) * 6364136223846793005
    mixed = held * multiplier
    return (mixed ^ (mixed >> 29)).sum(dim=-1)


def rows_that_share(
    plan: SegmentPlan, *, keys: int = 256, max_tokens: int = 8, least: int = 2
) -> torch.Tensor:
    """[R] bool: rows whose first `keys` keys are read by `least` rows or more.

    For a caller that computes only some rows by its plan: these gain from being among them, whether
    they belong to a group or found their prefix in a cache. Nothing is read back from the device.
    """
    found = torch.zeros(plan.num_rows, dtype=torch.bool, device=plan.device)
    shared = shared_spans(plan, max(1, keys // plan.block_size), max_tokens)
    if shared is None:
        return found
    row, size = shared.row[0], run_sizes(shared.same[:1])[0]
    found[row] = size >= least
    return found


def run_sizes(same: torch.Tensor) -> torch.Tensor:
    """[C, R]: how many rows share the span with the row at a place, itself included."""
    start, end = _runs(same)
    return end - start


def _runs(same: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First place of the run that a place is in, and the first one behind it."""
    num_rows = same.shape[1]
    place = torch.arange(num_rows, device=same.device).expand(same.shape)
    start = torch.where(same, 0, place).cummax(dim=1).values
    # A run ends where the next one starts; looked up from behind.
    after = torch.full_like(place, num_rows)
    after[:, :-1] = torch.where(same[:, 1:], num_rows, place[:, 1:])
    return start, after.flip(1).cummin(dim=1).values.flip(1)


def tile_sizes(shared: SharedSpans, most: int, least: int) -> torch.Tensor:
    """[C, R] int32: the rows of the tile that begins at a place, 0 inside a tile.

    The rows that share a span are cut into tiles of at most `most`, evenly; fewer than `least`
    stay alone. Runs on the device, like `shared_spans`.
    """
    start, end = _runs(shared.same)
    place = torch.arange(shared.same.shape[1], device=shared.same.device)
    size, rank = end - start, place - start
    tiles = (size + most - 1) // most
    each = (size + tiles - 1) // tiles
    each = torch.where(size < least, 1, each)
    rows = torch.minimum(each, size - rank)
    return torch.where(rank % each == 0, rows, 0).to(torch.int32)
