"""Problems on poisoned memory, and a dense fp64 oracle that shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention_kernels import Rotary, Row, Segment


@dataclass(frozen=True, eq=False)
class Case:
    """One attention problem. Every slot that no segment holds is NaN or infinite."""

    query: torch.Tensor  # [T, Hq, D]
    key_cache: torch.Tensor  # [num_blocks, block_size, Hkv, D]
    value_cache: torch.Tensor
    rows: tuple[Row, ...]
    rotary: Rotary | None = None

    @property
    def block_size(self) -> int:
        return self.key_cache.shape[1]

    @property
    def scale(self) -> float:
        return float(self.query.shape[2]) ** -0.5


class Memory:
    """Hands out blocks in random order and remembers which slots are written."""

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(num_blocks, generator=self.generator).tolist()
        self.written = torch.zeros(num_blocks, block_size, dtype=torch.bool)

    def segment(self, length: int, first_slot: int = 0, **rest: object) -> Segment:
        block_size = self.written.shape[1]
        count = -(-(first_slot + length) // block_size) if length else 0
        blocks = tuple(self.free.pop() for _ in range(count))
        for place in range(first_slot, first_slot + length):
            self.written[blocks[place // block_size], place % block_size] = True
        return Segment(blocks, length, first_slot, **rest)  # type: ignore[arg-type]

    def case(
        self,
        rows: tuple[Row, ...] | list[Row],
        *,
        heads: tuple[int, int] = (6, 2),
        dim: int = 32,
        dtype: torch.dtype = torch.float32,
        transposed: bool = True,
        rotary: Rotary | None = None,
    ) -> Case:
        shape = (*self.written.shape, heads[1], dim)
        caches = []
        for poison in (float("nan"), float("inf")):
            cache = torch.full(shape, poison)
            filled = torch.randn(int(self.written.sum()), heads[1], dim, generator=self.generator)
            cache[self.written] = filled
            caches.append(cache.to(dtype))
        key, value = caches
        if transposed:
            key = key.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            value = value.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
        num_tokens = sum(row.query_len for row in rows)
        query = torch.randn(num_tokens, heads[0], dim, generator=self.generator).to(dtype)
        return Case(query, key, value, tuple(rows), rotary)


def make_rotary(rotary_dim: int = 32, is_neox_style: bool = True) -> Rotary:
    inv_freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    return Rotary(inv_freq, rotary_dim, is_neox_style)


def oracle(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], lse [T, Hq]) in fp64: a dense mask over gathered keys."""
    return _dense(case, torch.float64)


def same_precision(case: Case) -> torch.Tensor:
    """The same in the case's own dtype, whose error is the yardstick."""
    return _dense(case, case.query.dtype)[0]


def _dense(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    group = case.query.shape[1] // case.key_cache.shape[2]
    out = torch.zeros(case.query.shape, dtype=dtype)
    lse = torch.full(case.query.shape[:2], -torch.inf, dtype=torch.float64)
    start = 0
    for row in case.rows:
        tokens = slice(start, start + row.query_len)
        start += row.query_len
        if row.query_len == 0:
            continue
        mask = torch.cat([_mask(row, number) for number in range(len(row.segments))], dim=1)
        places = [place for segment in row.segments for place in _places(case, segment)]
        blocks, slots = torch.tensor(places, dtype=torch.long).T
        value = case.value_cache[blocks, slots].to(dtype).repeat_interleave(group, 1)
        value[~mask.any(dim=0)] = 0
        scores = torch.cat([_scores(case, s, case.query[tokens], dtype) for s in row.segments], 2)
        scores = scores.masked_fill(~mask, -torch.inf)
        lse[tokens] = torch.logsumexp(scores.double(), dim=2).T
        weights = scores.softmax(dim=2).masked_fill(~mask, 0)
        out[tokens] = (weights @ value.transpose(0, 1)).transpose(0, 1)
    return out, lse


def _mask(row: Row, number: int) -> torch.Tensor:
    """[query_len, length] bool: what each query token sees of a segment."""
    segment, token = row.segments[number], torch.arange(row.query_len)[:, None]
    key = torch.arange(segment.length)
    mask = (key >= 0).expand(row.query_len, -1)
    if number == len(row.segments) - 1:
        mask = key < segment.length - row.query_len + token + 1
    if segment.visible is not None:
        mask = mask & (key < torch.tensor(segment.visible)[:, None])
    return mask


def _places(case: Case, segment: Segment) -> list[tuple[int, int]]:
    """(block, slot) of each token of a segment."""
    positions = range(segment.first_slot, segment.first_slot + segment.length)
    return [(segment.blocks[p // case.block_size], p % case.block_size) for p in positions]


def _scores(case: Case, segment: Segment, query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[Hq, query_len, length] scaled scores of one segment."""
    places = torch.tensor(_places(case, segment), dtype=torch.long).reshape(-1, 2)
    key = case.key_cache[places[:, 0], places[:, 1]].to(dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    query = _turned(case, segment, query).to(dtype)
    return query.transpose(0, 1) @ key.permute(1, 2, 0) * case.scale


def _turned(case: Case, segment: Segment, query: torch.Tensor) -> torch.Tensor:
    """The query times exp(i * shift * inv_freq), pairs of dims being complex numbers."""
    if case.rotary is None:
        return query
    half, query = case.rotary.rotary_dim // 2, query.double().clone()
    shift = torch.tensor(segment.shift, dtype=torch.float64).expand(query.shape[0])
    turn = torch.exp(1j * shift[:, None, None] * case.rotary.inv_freq.double())
    if case.rotary.is_neox_style:
        left, right = slice(0, half), slice(half, 2 * half)
    else:
        left, right = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    turned = torch.complex(query[..., left], query[..., right]) * turn
    query[..., left], query[..., right] = turned.real, turned.imag
    return query
