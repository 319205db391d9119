"""Plans: what they hold, what they refuse, and that they never wait for the device."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from attention_kernels import (
    PackedRow,
    Rotary,
    Row,
    Segment,
    SegmentPlan,
    pack_rows,
    provider,
    segmented_attention,
)
from tests.support.repository import ROOT
from tests.support.segment_cases import make_rotary


def row(segment: Segment, query_len: int = 1) -> Row:
    return Row(query_len, (segment,))


@pytest.mark.parametrize(
    ("bad", "value"),
    [
        (Row(-1, ()), "query_len -1"),
        (Row(2, ()), "2 query tokens"),
        (row(Segment((0,), -4)), "length -4"),
        (row(Segment((0,), 17)), "17 exceeds the 16 slots"),
        (row(Segment((0,), 16, first_slot=1)), "16 exceeds the 15 slots"),
        (row(Segment((), 1)), "1 exceeds the 0 slots"),
        (row(Segment((0,), 1, first_slot=16)), "first_slot 16"),
        (row(Segment((0,), 1, first_slot=-1)), "first_slot -1"),
        (row(Segment((0,), 2), 3), "length 2, less than query_len 3"),
        (row(Segment((-1,), 1)), "block id -1"),
        (row(Segment((2**31,), 1)), f"block id {2**31}"),
        (row(Segment((0,), 5, shift=(1, 2))), "shift has 2 values for 1"),
        (row(Segment((0,), 5, shift=2**31)), f"shift {2**31}"),
        (row(Segment((0,), 5, visible=(1, 2)), 3), "visible has 2 values for 3"),
        (row(Segment((0,), 5, visible=(-1,))), "visible -1"),
    ],
)
def test_build_names_the_row_and_the_value(bad: Row, value: str) -> None:
    good = row(Segment((0,), 5))
    with pytest.raises(ValueError, match=f"row 1: .*{value}"):
        SegmentPlan.build([good, bad])


def test_build_refuses_a_block_size_of_zero() -> None:
    with pytest.raises(ValueError, match="block_size"):
        SegmentPlan.build([], block_size=0)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"query": torch.zeros(3, 4, 32)}, "2 tokens, query 3"),
        ({"query": torch.zeros(2, 3, 32)}, "3 query heads over 2 KV heads"),
        ({"query": torch.zeros(2, 4, 16)}, "head dim of query is 16"),
        ({"query": torch.zeros(2, 4)}, "expected query"),
        ({"query": torch.zeros(2, 4, 32).half()}, "dtypes"),
        ({"value_cache": torch.zeros(4, 16, 2, 32).half()}, "dtypes"),
        ({"value_cache": torch.zeros(4, 16, 1, 32)}, "differ"),
        ({"key_cache": torch.zeros(2, 16, 2, 32), "value_cache": torch.zeros(2, 16, 2, 32)},
         "row 0: block id 3"),
        ({"key_cache": torch.zeros(4, 8, 2, 32), "value_cache": torch.zeros(4, 8, 2, 32)},
         "block size"),
        ({"out": torch.zeros(2, 4, 31)}, "out must be like query"),
        ({"out": torch.zeros(2, 4, 32).half()}, "out must be like query"),
        ({"rotary": None}, "row 1: shift 7"),
        ({"rotary": make_rotary(64)}, "rotary_dim 64"),
        ({"provider": "cuda"}, "provider"),
        ({"query": torch.zeros(2, 4, 32, device="meta")}, "several devices"),
    ],
)  # fmt: skip
def test_attention_refuses_what_does_not_fit(change: dict[str, object], value: str) -> None:
    rows = [row(Segment((3,), 5)), row(Segment((1,), 5, shift=7))]
    arguments: dict[str, object] = {
        "query": torch.zeros(2, 4, 32),
        "key_cache": torch.zeros(4, 16, 2, 32),
        "value_cache": torch.zeros(4, 16, 2, 32),
        "plan": SegmentPlan.build(rows),
        "scale": 1.0,
        "rotary": make_rotary(),
    }
    segmented_attention(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=value):
        segmented_attention(**(arguments | change))  # type: ignore[arg-type]


def test_attention_refuses_other_dtypes() -> None:
    query, cache = torch.zeros(1, 1, 32).double(), torch.zeros(1, 16, 1, 32).double()
    with pytest.raises(ValueError, match="float64"):
        segmented_attention(
            query, cache, cache, SegmentPlan.build([row(Segment((0,), 1))]), scale=1
        )


@pytest.mark.parametrize("rotary_dim", [0, -2, 3, 64])
def test_rotary_refuses_a_wrong_dim(rotary_dim: int) -> None:
    with pytest.raises(ValueError, match=r"rotary_dim|inv_freq"):
        Rotary(torch.ones(16), rotary_dim, True)


@pytest.mark.parametrize("field", ["seq_lens", "query_start_loc", "row_mask"])
def test_block_table_refuses_wrong_shapes(field: str) -> None:
    fields = {
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 2], dtype=torch.int32),
        "fill": torch.full((4,), 16, dtype=torch.int32),
        "row_mask": torch.ones(2, dtype=torch.bool),
    }
    SegmentPlan.from_block_table(**fields, block_size=16)
    fields[field] = fields[field][:1]
    with pytest.raises(ValueError, match=field):
        SegmentPlan.from_block_table(**fields, block_size=16)


def test_block_table_plans_never_wait_for_the_device() -> None:
    """The meta device has no data: reading any of it on the host raises."""
    fields = {
        "block_table": torch.zeros(2, 3, dtype=torch.int32, device="meta"),
        "seq_lens": torch.ones(2, dtype=torch.int32, device="meta"),
        "query_start_loc": torch.zeros(3, dtype=torch.int32, device="meta"),
        "fill": torch.zeros(4, dtype=torch.int32, device="meta"),
        "row_mask": torch.ones(2, dtype=torch.bool, device="meta"),
    }
    plan = SegmentPlan.from_block_table(**fields, block_size=16)
    assert plan.device.type == "meta" and plan.count.shape == (2, 3)
    with pytest.raises((RuntimeError, NotImplementedError)):
        plan.num_entries.max().item()


def test_plain_plans_carry_no_tables() -> None:
    plan = SegmentPlan.build([row(Segment((0, 1), 20)), row(Segment((2,), 3, shift=0))])
    assert plan.shifts is None and plan.visible is None
    assert plan.num_tokens == 2 and plan.max_block == (1, 2)


def test_entries_of_a_plan() -> None:
    rows = [Row(3, (Segment((5, 6), 20, first_slot=7), Segment((), 0), Segment((1, 2, 9), 18)))]
    plan = SegmentPlan.build(rows)
    assert plan.num_entries.tolist() == [4]
    assert plan.blocks.tolist() == [[5, 6, 1, 2]]
    assert plan.first.tolist() == [[7, 0, 0, 0]]
    assert plan.count.tolist() == [[9, 11, 16, 2]]
    assert plan.bound[0, 2:].tolist() == [-15, 1]
    assert (plan.bound[0, :2] < -(2**29)).all()


def test_equal_segments_of_a_row_are_told_apart() -> None:
    """Only the last one is causal, even if the very same object comes twice."""
    same = Segment((0,), 4)
    plan = SegmentPlan.build([Row(2, (same, same))])
    assert plan.bound.tolist()[0][1] == -2 and plan.bound.tolist()[0][0] < -(2**29)


def test_auto_falls_back_to_torch_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(provider.PROVIDERS, "cpu", "attention_kernels.no_such_module")
    provider._load.cache_clear()
    provider._auto_provider.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            first = provider.get_provider("auto", torch.device("cpu"))
            second = provider.get_provider("auto", torch.device("cpu"))
        assert first is second is provider.get_provider("torch", torch.device("cpu"))
        assert len(caplog.records) == 1 and "'cpu' is unavailable" in caplog.text
        with pytest.raises(ImportError):
            provider.get_provider("cpu", torch.device("cpu"))
    finally:
        provider._load.cache_clear()
        provider._auto_provider.cache_clear()


def test_auto_takes_the_cpu_kernel_for_cpu_tensors() -> None:
    from attention_kernels.cpu import launch

    assert provider.get_provider("auto", torch.device("cpu")) is launch.attend


def test_the_package_knows_nothing_of_vllm() -> None:
    """And loads neither Numba nor Triton before a provider is asked for."""
    code = (
        "import sys, attention_kernels\n"
        "assert not {'numba', 'triton'} & set(sys.modules), 'loaded early'\n"
        "from attention_kernels import reference\n"
        "from attention_kernels.cpu import launch\n"
        "from attention_kernels.triton import rows\n"
        "found = [m for m in sys.modules if m.split('.')[0].startswith('vllm')]\n"
        "assert not found, found\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr


def test_packed_rows_are_what_build_makes() -> None:
    lengths = [[33, 16, 5, 40], [33, 16, 40, 7], [1], [16, 3]]
    shifts = [[90, 57, 40, 0], [60, 27, 11, 0], [0], [-4, 0]]
    packed, built, start = [], [], 0
    for row, (sizes, turns) in enumerate(zip(lengths, shifts, strict=True)):
        query_len = 1 + row % 3 if sizes[-1] > 2 else 1
        spans = [-(-size // 16) for size in sizes]
        blocks = [np.arange(50 * row + 10 * i, 50 * row + 10 * i + n) for i, n in enumerate(spans)]
        packed.append(
            PackedRow(start, query_len, [b.astype(np.int32) for b in blocks], sizes, turns)
        )
        built.append(
            Row(
                query_len,
                tuple(
                    Segment(tuple(ids.tolist()), size, shift=turn)
                    for ids, size, turn in zip(blocks, sizes, turns, strict=True)
                ),
            )
        )
        start += query_len
    one, other = pack_rows(packed, 16), SegmentPlan.build(built, 16)
    for name in ("blocks", "first", "count", "bound", "num_entries", "query_start", "query_len"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.shifts is not None and other.shifts is not None
    for plan in (one, other):
        assert plan.shifts is not None
    turned = [p.shifts.values[p.shifts.index.long()] for p in (one, other)]
    used = torch.arange(turned[0].shape[2]) < one.query_len[:, None, None]
    assert torch.equal(turned[0] * used, turned[1] * used)
    assert one.max_query_len == other.max_query_len


def test_packed_rows_without_shifts_have_no_table() -> None:
    ids = [np.arange(2, dtype=np.int32)]
    assert pack_rows([PackedRow(0, 1, ids, [20], [0])], 16).shifts is None
