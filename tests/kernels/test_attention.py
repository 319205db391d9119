"""Every provider against a dense fp64 oracle, on memory whose unused slots are poisoned.

Run with TRITON_INTERPRET=1 this module tests the Triton provider in its interpreter, and only it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_kernels import Row, Segment, SegmentPlan, segmented_attention
from tests.support.providers import PROVIDERS, check, device_of, run
from tests.support.segment_cases import Case, Memory, make_rotary, oracle, same_precision

pytestmark = pytest.mark.parametrize("provider", PROVIDERS)


def mixed_rows(memory: Memory) -> list[Row]:
    """Decode, three tokens, a prefill of 63, an empty row; shared, empty and offset segments."""
    shared, start = memory.segment(70), memory.segment(21, first_slot=7)
    return [
        Row(1, (shared, memory.segment(13), memory.segment(0), memory.segment(5))),
        Row(3, (shared, start, memory.segment(3))),
        Row(0, ()),
        Row(63, (shared, memory.segment(64, first_slot=3))),
        Row(1, (memory.segment(1),)),
    ]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("block_size", [8, 16, 32, 128])
def test_block_sizes_and_layouts(provider: str, block_size: int, transposed: bool) -> None:
    memory = Memory(80, block_size)
    check(memory.case(mixed_rows(memory), transposed=transposed), provider)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1), (40, 1)])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 20])
def test_heads(provider: str, heads: tuple[int, int], dim: int) -> None:
    memory = Memory(20, 16)
    rows = [Row(1, (memory.segment(20), memory.segment(3))), Row(5, (memory.segment(18),))]
    check(memory.case(rows, heads=heads, dim=dim), provider)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
def test_dtypes(provider: str, dtype: torch.dtype, transposed: bool) -> None:
    memory = Memory(60, 16)
    check(memory.case(mixed_rows(memory), dtype=dtype, transposed=transposed), provider)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_head", [True, False])
def test_fp8_caches(
    provider: str, cache_dtype: torch.dtype, dtype: torch.dtype, per_head: bool
) -> None:
    """The same as dequantized caches: fp8 to bf16 loses nothing, and scales come in fp32."""
    memory = Memory(60, 16)
    case = memory.case(mixed_rows(memory), dtype=dtype)
    scales = torch.tensor([[0.37, 2.5], [1.9, 0.8]] if per_head else [[0.37], [1.9]])
    stored = [cache.to(cache_dtype) for cache in (case.key_cache, case.value_cache)]
    exact = [
        cache.double() * scale.double()[:, None]
        for cache, scale in zip(stored, scales, strict=True)
    ]
    expected, expected_lse = oracle(replace(case, key_cache=exact[0], value_cache=exact[1]))
    device = device_of(provider)
    plan = SegmentPlan.build(case.rows, case.block_size, device)
    query = case.query.to(device)
    caches = [cache.to(device) for cache in stored]
    key_scale, value_scale = (s if per_head else s[0] for s in scales.to(device))
    given = {"scale": case.scale, "key_scale": key_scale, "value_scale": value_scale}
    if provider == "cpu":
        with pytest.raises(ValueError, match="cpu provider takes caches of the query's type"):
            segmented_attention(query, *caches, plan, provider=provider, **given)
        return
    out, lse = segmented_attention(query, *caches, plan, provider=provider, **given)
    assert lse is not None and not out.isnan().any()
    own = [cache.to(dtype) for cache in exact]
    same = same_precision(replace(case, key_cache=own[0], value_cache=own[1]))
    budget = 2 * (same.double() - expected).abs().max() + 2e-6
    assert (out.cpu().double() - expected).abs().max() <= budget
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-6, atol=tolerance)


def test_scales_that_do_not_fit_are_refused(provider: str) -> None:
    memory = Memory(60, 16)
    case = memory.case(mixed_rows(memory))
    plan = SegmentPlan.build(case.rows, case.block_size)
    for wrong, says in (
        (torch.ones(3), r"key_scale must be \[\] or \[2\], got \[3\]"),
        (torch.ones(1, 2), "key_scale must be"),
        (torch.ones(2).double(), "key_scale must be float32"),
    ):
        with pytest.raises(ValueError, match=says):
            segmented_attention(
                case.query, case.key_cache, case.value_cache, plan,
                scale=case.scale, key_scale=wrong, provider=provider,
            )  # fmt: skip


def test_hundred_segments(provider: str) -> None:
    memory = Memory(200, 16)
    lengths = [(7 * i) % 20 for i in range(100)] + [4]
    rows = [Row(2, tuple(memory.segment(length) for length in lengths))]
    check(memory.case(rows), provider)


def test_long_rows_are_split_and_merged(provider: str) -> None:
    memory = Memory(140, 16)
    long = memory.segment(1500)
    rows = [Row(1, (long, memory.segment(1))), Row(2, (long, memory.segment(600)))]
    check(memory.case(rows, heads=(3, 1)), provider)


@pytest.mark.parametrize("query_len", [1, 2, 10, 11, 63, 64, 65])
def test_query_lengths_around_the_tile(provider: str, query_len: int) -> None:
    memory = Memory(20, 16)
    rows = [Row(query_len, (memory.segment(33), memory.segment(query_len + 4)))]
    check(memory.case(rows, heads=(3, 1)), provider)


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shift(provider: str, is_neox_style: bool, rotary_dim: int, dtype: torch.dtype) -> None:
    memory = Memory(40, 16)
    shared = memory.segment(37)
    rows = [
        Row(1, (replace(shared, shift=5), memory.segment(20, shift=-90), memory.segment(4))),
        Row(3, (replace(shared, shift=(1000, 0, -7)), memory.segment(9), memory.segment(3))),
        Row(12, (shared, memory.segment(18, shift=123456))),
    ]
    rotary = make_rotary(rotary_dim, is_neox_style)
    check(memory.case(rows, dtype=dtype, rotary=rotary), provider)


def test_visible(provider: str) -> None:
    memory = Memory(40, 16)
    rows = [
        Row(1, (memory.segment(37, visible=(20,)), memory.segment(4))),
        Row(3, (memory.segment(30, visible=(0, 17, 99)), memory.segment(9, visible=(9, 2, 0)))),
        Row(2, (memory.segment(20, first_slot=5, visible=(12, 20)), memory.segment(2))),
    ]
    check(memory.case(rows), provider)


def test_visible_and_shift_together(provider: str) -> None:
    memory = Memory(40, 16)
    rows = [
        Row(3, (memory.segment(30, visible=(4, 17, 30), shift=(3, 2, 1)), memory.segment(9))),
        Row(1, (memory.segment(30, shift=9), memory.segment(9, visible=(5,)))),
    ]
    check(memory.case(rows, rotary=make_rotary()), provider)


@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.float32), (256, torch.bfloat16)])
def test_blocks_larger_than_a_step(provider: str, dim: int, dtype: torch.dtype) -> None:
    """Triton reads blocks of 64 tokens of such heads in two or four parts."""
    memory = Memory(40, 64)
    prefix = memory.segment(150)
    rows = [
        Row(1, (replace(prefix, shift=3), memory.segment(70))),
        Row(1, (replace(prefix, shift=3), memory.segment(7, first_slot=50))),
        Row(3, (memory.segment(100, visible=(4, 17, 99), shift=(3, 2, 1)), memory.segment(61))),
        Row(90, (prefix, memory.segment(100))),
    ]
    case = memory.case(rows, heads=(4, 2), dim=dim, dtype=dtype, rotary=make_rotary(dim))
    check(case, provider)


def test_a_token_that_sees_nothing_gets_zeros(provider: str) -> None:
    memory = Memory(40, 16)
    rows = [
        Row(2, (memory.segment(600, visible=(0, 3)), memory.segment(2, visible=(0, 0)))),
        Row(1, (memory.segment(4),)),
    ]
    case = memory.case(rows, heads=(4, 2))
    out, lse = run(case, provider)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert lse[1:].isfinite().all()
    check(case, provider)


def test_keys_that_no_token_sees_may_be_poisoned(provider: str) -> None:
    memory = Memory(10, 16)
    hidden = replace(memory.segment(20), length=32, visible=(20, 11))
    check(memory.case([Row(2, (hidden, memory.segment(5)))]), provider)


def test_segments_are_one_softmax(provider: str) -> None:
    """Cutting a segment in two, at a block border or by first_slot, changes nothing."""
    memory = Memory(20, 16)
    whole, last = memory.segment(100), memory.segment(3)
    case = memory.case([Row(3, (whole, last))])
    border = (Segment(whole.blocks[:4], 64), Segment(whole.blocks[4:], 36))
    inside = (Segment(whole.blocks[:4], 59), Segment(whole.blocks[3:], 41, first_slot=11))
    expected = run(case, provider)
    for parts in (border, inside):
        out, lse = run(replace(case, rows=(Row(3, (*parts, last)),)), provider)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=2e-6)


def test_large_scores_do_not_overflow(provider: str) -> None:
    memory = Memory(20, 16)
    case = memory.case([Row(1, (memory.segment(150), memory.segment(3)))])
    check(replace(case, query=case.query * 300), provider)


def test_strided_query_and_out(provider: str) -> None:
    memory = Memory(60, 16)
    case = memory.case(mixed_rows(memory))
    device = device_of(provider)
    num_tokens, num_heads, dim = case.query.shape
    wide = torch.full((num_tokens, num_heads + 3, dim), torch.nan)
    wide[:, :num_heads] = case.query
    out = torch.empty(num_heads, dim, num_tokens, device=device).permute(2, 0, 1)
    plan = SegmentPlan.build(case.rows, case.block_size, device)
    caches = case.key_cache.to(device), case.value_cache.to(device)
    result, lse = segmented_attention(
        wide.to(device)[:, :num_heads], *caches, plan, scale=case.scale, provider=provider,
        out=out, return_lse=False,
    )  # fmt: skip
    assert result is out and lse is None
    torch.testing.assert_close(out.cpu(), run(case, provider)[0], rtol=0, atol=0)


def table_case() -> tuple[Case, dict[str, torch.Tensor]]:
    """A batch as vLLM describes it: index spaces with holes behind sealed blocks."""
    memory = Memory(40, 16)
    fills = {}

    def sealed(length: int) -> Segment:
        segment = memory.segment(length)
        fills.update({b: min(16, length - 16 * i) for i, b in enumerate(segment.blocks)})
        return segment

    prefix, path = sealed(37), sealed(20)
    tails = (memory.segment(3), memory.segment(19), memory.segment(40))
    rows = (
        Row(1, (prefix, tails[0])),
        Row(5, (prefix, path, tails[1])),
        Row(33, (tails[2],)),
    )
    lens = [48 + 3, 48 + 32 + 19, 40]
    table = torch.full((3, 12), -1, dtype=torch.int32)
    for r, row in enumerate(rows):
        ids = [b for s in row.segments for b in s.blocks] + [39_000_000]
        table[r, : len(ids)] = torch.tensor(ids)
    fill = torch.full((40,), 16, dtype=torch.int32)
    for block, slots in fills.items():
        fill[block] = slots
    fields = {
        "block_table": table,
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 6, 39], dtype=torch.int32),
        "fill": fill,
    }
    return memory.case(rows), fields


def test_block_table_equals_build(provider: str) -> None:
    case, fields = table_case()
    device = device_of(provider)
    plan = SegmentPlan.from_block_table(
        **{name: field.to(device) for name, field in fields.items()}, block_size=16
    )
    out, lse = run(case, provider, plan)
    expected, expected_lse = run(case, provider)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2e-6)
    check(case, provider)


def test_masked_rows_are_left_untouched(provider: str) -> None:
    case, fields = table_case()
    device = device_of(provider)
    plan = SegmentPlan.from_block_table(
        **{name: field.to(device) for name, field in fields.items()},
        block_size=16,
        row_mask=torch.tensor([True, False, True], device=device),
    )
    out = torch.full_like(case.query, 7.0, device=device)
    _, lse = segmented_attention(
        case.query.to(device), case.key_cache.to(device), case.value_cache.to(device), plan,
        scale=case.scale, provider=provider, out=out,
    )  # fmt: skip
    assert lse is not None
    expected, expected_lse = run(case, provider)
    assert (out[1:6] == 7.0).all() and (lse[1:6] == -torch.inf).all()
    live = [0, *range(6, 39)]
    torch.testing.assert_close(out.cpu()[live], expected[live], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.cpu()[live], expected_lse[live], rtol=0, atol=2e-6)


def test_padding_tokens_behind_a_block_table_are_left_untouched(provider: str) -> None:
    case, fields = table_case()
    device = device_of(provider)
    plan = SegmentPlan.from_block_table(
        **{name: field.to(device) for name, field in fields.items()}, block_size=16
    )
    padded = torch.cat([case.query, torch.full_like(case.query[:20], torch.nan)])
    out, lse = run(replace(case, query=padded), provider, plan)
    torch.testing.assert_close(out[:39], run(case, provider)[0], rtol=0, atol=1e-6)
    assert (out[39:] == 0).all() and (lse[39:] == -torch.inf).all()


def test_runs_are_bit_identical(provider: str) -> None:
    memory = Memory(140, 16)
    rows = [*mixed_rows(memory), Row(1, (memory.segment(1200), memory.segment(1)))]
    case = memory.case(rows)
    first, second = run(case, provider), run(case, provider)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_no_rows_and_no_tokens(provider: str) -> None:
    memory = Memory(4, 16)
    memory.segment(4)
    for rows in ([], [Row(0, ())], [Row(0, (memory.segment(3),))]):
        case = memory.case(rows)
        out, lse = run(case, provider)
        assert out.shape == case.query.shape and lse.shape == case.query.shape[:2]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_plans(provider: str, data: st.DataObject) -> None:
    memory = Memory(200, 16, seed=data.draw(st.integers(0, 1000)))
    pool = [memory.segment(data.draw(st.integers(0, 40))) for _ in range(3)]
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        query_len = data.draw(st.integers(0, 9))
        parts = [
            replace(
                segment,
                shift=data.draw(st.integers(-50, 50)),
                visible=tuple(data.draw(st.integers(0, 45)) for _ in range(query_len)),
            )
            for segment in data.draw(st.lists(st.sampled_from(pool), max_size=3))
        ]
        own = memory.segment(query_len + data.draw(st.integers(0, 20)))
        rows.append(Row(query_len, (*parts, own)))
    check(memory.case(rows, heads=(2, 1), rotary=make_rotary()), provider)
