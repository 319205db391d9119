"""Rows that read the same blocks: who shares what, and that values do not suffer from it.

Spans are made short here, so that small problems have many. Run with TRITON_INTERPRET=1 this module
tests the Triton provider in its interpreter.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from attention_kernels import Row, Segment, SegmentPlan, prefix_sharing, rows_that_share
from attention_kernels.cpu import tasks
from attention_kernels.triton import shared_spans
from tests.support.providers import PROVIDERS, check, run
from tests.support.segment_cases import Case, Memory, make_rotary

# The reference reads every row for itself.
with_providers = pytest.mark.parametrize("provider", [p for p in PROVIDERS if p != "torch"])


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SPAN_KEYS", 32)
    monkeypatch.setattr(shared_spans, "SPAN_KEYS", (32,))


def tree(seed: int, block_size: int, depth: int = 3) -> tuple[Memory, list[Row]]:
    """The leaves of a random tree in random order; their queries are 1 to 3 tokens, one is 40."""
    chance = random.Random(seed)
    memory = Memory(3000 // block_size + 60, block_size, seed)
    rows: list[Row] = []

    def grow(path: tuple[Segment, ...], level: int) -> None:
        if level == depth:
            query_len = chance.choice((1, 1, 2, 3))
            own = memory.segment(query_len + chance.randrange(40))
            rows.append(Row(query_len, (*path, own)))
            return
        for _ in range(chance.randint(1, 3)):
            grow((*path, memory.segment(chance.choice((0, 5, 33, 64)))), level + 1)

    grow((memory.segment(100),), 0)
    rows.append(Row(40, (*rows[0].segments[:-1], memory.segment(45))))
    chance.shuffle(rows)
    return memory, rows


def plain(case: Case) -> SegmentPlan:
    return SegmentPlan.build(case.rows, case.block_size, share=False)


def check_tree(case: Case, provider: str) -> None:
    """Right by the oracle; on the CPU also the same bits as without sharing."""
    check(case, provider)
    if provider == "cpu":
        shared, apart = run(case, provider), run(case, provider, plain(case))
        assert torch.equal(shared[0], apart[0]) and torch.equal(shared[1], apart[1])


@with_providers
@pytest.mark.parametrize("seed", range(4))
def test_random_trees(provider: str, seed: int) -> None:
    memory, rows = tree(seed, 16)
    check_tree(memory.case(rows, heads=(6, 2)), provider)


@with_providers
@pytest.mark.parametrize("seed", [4, 5])
def test_providers_agree_and_repeat_themselves(provider: str, seed: int) -> None:
    memory, rows = tree(seed, 16)
    case = memory.case(rows, heads=(7, 1))
    own, again, reference = run(case, provider), run(case, provider), run(case, "torch")
    assert torch.equal(own[0], again[0]) and torch.equal(own[1], again[1])
    torch.testing.assert_close(own[0], reference[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(own[1], reference[1], rtol=0, atol=4e-6)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIAGONAL = [
    (torch.float32, 64, 1, 32),
    (torch.bfloat16, 80, 4, 16),
    (torch.float16, 96, 5, 128),
    (torch.float32, 128, 7, 16),
    (torch.bfloat16, 256, 8, 32),
    (torch.float16, 64, 7, 32),
]


@with_providers
@pytest.mark.parametrize(
    ("dtype", "dim", "group", "block_size"), DIAGONAL[:: 2 if PROVIDERS == ["triton"] else 1]
)
def test_trees_of_many_shapes(
    provider: str, dtype: torch.dtype, dim: int, group: int, block_size: int
) -> None:
    memory, rows = tree(dim + group, block_size, depth=2)
    check_tree(memory.case(rows, heads=(group, 1), dim=dim, dtype=dtype), provider)


@pytest.mark.slow
@with_providers
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("group", [1, 4, 5, 7, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_trees_of_all_shapes(
    provider: str, dtype: torch.dtype, dim: int, group: int, block_size: int, transposed: bool
) -> None:
    memory, rows = tree(dim + group, block_size)
    heads = (2 * group, 2)
    case = memory.case(rows, heads=heads, dim=dim, dtype=dtype, transposed=transposed)
    check_tree(case, provider)


@with_providers
def test_many_siblings_fill_several_tiles(provider: str) -> None:
    memory = Memory(200, 16)
    prefix = memory.segment(64)
    rows = [Row(1, (prefix, memory.segment(1 + i))) for i in range(20)]
    check_tree(memory.case(rows, heads=(5, 1)), provider)


@with_providers
def test_shifted_rows_share_if_they_turn_alike(provider: str) -> None:
    memory = Memory(60, 16)
    prefix = memory.segment(96)
    shifts = (7, 7, 0, (3, 9), (3, 9), 7)
    rows = [
        Row(2 if isinstance(shift, tuple) else 1, (replace(prefix, shift=shift), memory.segment(9)))
        for shift in shifts
    ]
    case = memory.case(rows, rotary=make_rotary())
    plan = SegmentPlan.build(case.rows)
    assert groups(plan, 2) == [{frozenset({0, 1, 5}), frozenset({3, 4})}] * 3
    check_tree(case, provider)


def turned_rows(memory: Memory) -> list[Row]:
    """Rows that read the same blocks at places of their own, as Hogwild's workers do."""
    prefix, cache = memory.segment(48), memory.segment(75)
    shifts = [(0, 5), (3, -20), (3, 5), ((1, 2), (9, 8)), (0, 0)]
    return [
        Row(2, (replace(prefix, shift=first), replace(cache, shift=then), memory.segment(2 + i)))
        for i, (first, then) in enumerate(shifts)
    ]


@with_providers
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 24])
def test_rows_that_turn_differently(provider: str, is_neox_style: bool, rotary_dim: int) -> None:
    memory = Memory(60, 16)
    rows = turned_rows(memory)
    check_tree(memory.case(rows, rotary=make_rotary(rotary_dim, is_neox_style)), provider)


def test_the_cpu_shares_whatever_the_shift() -> None:
    """48 + 75 tokens lie in 8 blocks, which are four spans; each row has one of its own."""
    plan = SegmentPlan.build(turned_rows(Memory(60, 16)))
    assert members(plan, 1) == [1] * 5 + [5] * 4


def test_triton_shares_whatever_the_shift() -> None:
    """Each line of a tile turns by itself, so that workers read what all of them see once."""
    plan = SegmentPlan.build(turned_rows(Memory(60, 16)))
    num_spans = -(-plan.blocks.shape[1] // 2)
    cut = shared_spans.Cut(2, num_spans, short_tokens=2, lines=4, shared_lines=64)
    places = shared_spans._places(plan, cut, group=2)
    assert places.tile[:4].tolist() == [[5, 0, 0, 0, 0]] * 4
    assert places.tile[4:].unique().tolist() == [1]


@pytest.mark.parametrize(
    "tuning",
    [
        shared_spans.Tuning(shared_lines=16, narrow=(5, 4)),
        shared_spans.Tuning(shared_lines=32, num_programs=1, wide=(5, 8)),
    ],
)
@pytest.mark.skipif("triton" not in PROVIDERS, reason="test_triton.py turns Triton on")
def test_any_tuning_is_right(monkeypatch: pytest.MonkeyPatch, tuning: shared_spans.Tuning) -> None:
    monkeypatch.setattr(shared_spans, "tuning", tuning)
    memory, rows = tree(7, 16)
    check_tree(memory.case(rows, heads=(6, 2)), "triton")


@with_providers
def test_rows_with_limited_sight_stand_alone(provider: str) -> None:
    memory = Memory(60, 16)
    prefix = memory.segment(96)
    rows = [Row(1, (prefix, memory.segment(9))) for _ in range(2)]
    rows += [Row(1, (replace(prefix, visible=(70,)), memory.segment(9))) for _ in range(2)]
    case = memory.case(rows)
    assert groups(SegmentPlan.build(case.rows), 2) == [{frozenset({0, 1})}] * 3
    check_tree(case, provider)


def groups(plan: SegmentPlan, span: int) -> list[set[frozenset[int]]]:
    """For each span the sets of rows that share it."""
    shared = prefix_sharing.shared_spans(plan, span, max_tokens=8)
    assert shared is not None
    found = []
    for rows, same in zip(shared.row.tolist(), shared.same.tolist(), strict=True):
        runs: list[list[int]] = []
        for row, joins in zip(rows, same, strict=True):
            if joins:
                runs[-1].append(row)
            else:
                runs.append([row])
        assert sorted(row for run in runs for row in run) == list(range(plan.num_rows))
        found.append({frozenset(run) for run in runs if len(run) > 1})
    return found


def table_plan(table: list[list[int]], lens: list[int], **rest: object) -> SegmentPlan:
    return SegmentPlan.from_block_table(
        torch.tensor(table, dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        torch.arange(len(lens) + 1, dtype=torch.int32),
        torch.full((100,), 16, dtype=torch.int32),
        block_size=16,
        **rest,  # type: ignore[arg-type]
    )


def test_a_tree_in_a_block_table() -> None:
    table = [
        [1, 2, 3, 4, 5, 6],  # prefix 1 2, path 3 4
        [9, 8, 7, 6, 5, 4],  # a stranger that holds some of the same blocks at other places
        [1, 2, 3, 4, 7, 8],
        [1, 2, 5, 6, 0, 0],  # prefix, another path
        [1, 2, 5, 6, 9, 0],
        [2, 1, 3, 4, 9, 0],  # same blocks in another order
    ]
    plan = table_plan(table, [96, 96, 96, 64, 70, 70])
    first, second, third = groups(plan, 2)
    assert first == {frozenset({0, 2, 3, 4})}
    assert second == {frozenset({0, 2, 5}), frozenset({3, 4})}
    assert third == set()


def test_what_a_row_does_not_hold_is_not_shared() -> None:
    """Blocks behind a row's end are left over from earlier rows."""
    plan = table_plan([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]], [64, 63, 33])
    assert groups(plan, 2) == [{frozenset({0, 1, 2})}, set()]
    masked = table_plan(
        [[1, 2], [1, 2], [1, 2]], [32, 32, 32], row_mask=torch.tensor([True, False, True])
    )
    assert groups(masked, 2) == [{frozenset({0, 2})}]


def test_rows_that_begin_alike() -> None:
    plan = table_plan([[1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2, 0], [1, 5, 0]], [48, 48, 48, 31, 32])
    assert rows_that_share(plan, keys=32).tolist() == [True, True, False, False, False]
    assert rows_that_share(plan, keys=16).tolist() == [True, True, False, True, True]
    assert not rows_that_share(plan, keys=16, least=5).any()
    assert not rows_that_share(plan, keys=64).any()


def test_equal_hashes_do_not_make_rows_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_sharing, "_hash", lambda held: held[..., 0].long() * 0)
    plan = table_plan([[1, 2], [1, 2], [3, 4], [3, 5], [3, 5]], [32] * 5)
    assert groups(plan, 2) == [{frozenset({0, 1}), frozenset({3, 4})}]


def test_sharing_is_found_without_waiting_for_the_device() -> None:
    """Tensors on the meta device have no values: reading one raises."""
    plan = SegmentPlan.from_block_table(
        torch.zeros(8, 12, dtype=torch.int32, device="meta"),
        torch.ones(8, dtype=torch.int32, device="meta"),
        torch.zeros(9, dtype=torch.int32, device="meta"),
        torch.zeros(4, dtype=torch.int32, device="meta"),
        block_size=16,
        row_mask=torch.ones(8, dtype=torch.bool, device="meta"),
    )
    shared = prefix_sharing.shared_spans(plan, 2, 4)
    assert shared is not None and shared.row.shape == (6, 8)
    assert prefix_sharing.tile_sizes(shared, 8, 2).shape == (6, 8)


@pytest.mark.parametrize(("most", "least"), [(3, 2), (8, 2), (2, 3), (1, 2)])
def test_tiles_of_a_span(most: int, least: int) -> None:
    runs = [1, 7, 2, 1, 3]
    same = torch.tensor([[i > 0 for n in runs for i in range(n)]])
    shared = prefix_sharing.SharedSpans(torch.arange(sum(runs))[None], same)
    sizes = prefix_sharing.tile_sizes(shared, most, least)[0].tolist()
    for n in runs:
        own, sizes = sizes[:n], sizes[n:]
        tiles = [size for size in own if size]
        assert sum(tiles) == n and own[0] == tiles[0]
        if n < least:
            assert tiles == [1] * n
        else:
            assert len(tiles) == -(-n // most) and max(tiles) - min(tiles) < max(tiles)
        place = 0
        while place < n:
            step = own[place]
            assert own[place + 1 : place + step] == [0] * (step - 1)
            place += step


def members(plan: SegmentPlan, group: int) -> list[int]:
    """Rows per task of the CPU provider."""
    return sorted(tasks.cut(plan, group).table[:, 1].tolist())


def test_a_shared_span_is_one_task() -> None:
    memory = Memory(100, 16)
    prefix = memory.segment(96)
    rows = [Row(1, (prefix, memory.segment(3))) for _ in range(8)]
    assert members(SegmentPlan.build(rows), 3) == [1] * 8 + [8] * 3
    assert members(SegmentPlan.build(rows, share=False), 3) == [1] * 32
    assert members(SegmentPlan.build(rows), 8) == [1] * 8 + [4] * 6


@pytest.mark.parametrize("group", [1, 8])
def test_below_the_gate_nothing_is_shared(group: int) -> None:
    """Too few rows for their group size take the plain path, bit by bit."""
    memory = Memory(100, 16)
    prefix = memory.segment(96)
    rows = [Row(1, (prefix, memory.segment(3))) for _ in range(tasks.worth_sharing(group) - 1)]
    case = memory.case(rows, heads=(2 * group, 2))
    assert set(members(SegmentPlan.build(rows), group)) == {1}
    shared, apart = run(case, "cpu"), run(case, "cpu", plain(case))
    assert torch.equal(shared[0], apart[0]) and torch.equal(shared[1], apart[1])


@with_providers
def test_a_table_of_siblings(provider: str) -> None:
    """The way of the adapters: a block table, its holes, decode and a few forced tokens."""
    memory = Memory(40, 16)
    prefix = memory.segment(7 * 16 - 5)
    tails = [memory.segment(n) for n in (4, 20, 33, 1)]
    query_lens = (1, 3, 1, 1)
    rows = [Row(n, (prefix, tail)) for n, tail in zip(query_lens, tails, strict=True)]
    case = memory.case(rows, heads=(7, 1))
    table = torch.zeros(4, 12, dtype=torch.int32)
    for r, row in enumerate(rows):
        ids = [block for segment in row.segments for block in segment.blocks]
        table[r, : len(ids)] = torch.tensor(ids)
    fill = torch.full((40,), 16, dtype=torch.int32)
    fill[prefix.blocks[-1]] = 11
    device = "cuda" if provider == "triton" and torch.cuda.is_available() else "cpu"
    plan = SegmentPlan.from_block_table(
        table.to(device),
        torch.tensor([7 * 16 + tail.length for tail in tails], device=device),
        torch.tensor([0, 1, 4, 5, 6], device=device),
        fill.to(device),
        block_size=16,
        max_query_len=3,
    )
    assert groups(plan, 2)[:3] == [{frozenset(range(4))}] * 3
    by_table, by_rows = run(case, provider, plan), run(case, provider)
    torch.testing.assert_close(by_table[0], by_rows[0], rtol=0, atol=2e-6)
    check(case, provider)
