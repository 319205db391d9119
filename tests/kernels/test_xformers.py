"""xFormers' masks as a second oracle: what they materialize to equals what our plan says.

xFormers attends on CUDA only. On a CPU its two operators are replaced by dense ones that use
nothing of a plan but the mask; on a GPU the real ones run as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_kernels import Row, Segment, SegmentPlan, segmented_attention, xformers
from tests.support.segment_cases import Case, Memory, make_rotary, oracle, same_precision


def dense_partial(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_slots = query.shape[1], key.shape[1]
    width = mask.block_tables.numel() * mask.page_size
    bias = mask.materialize((num_tokens, width), torch.float64)
    bias = torch.nn.functional.pad(bias, (0, num_slots - bias.shape[1]), value=-torch.inf)
    sees = bias == 0
    scores = torch.einsum("bmghd,bnghd->bghmn", query.double(), key.double()) * scale
    scores = torch.where(sees, scores, -torch.inf)
    used = sees.any(dim=0)[:, None, None, None]
    clean = torch.where(used, value.double(), 0.0)
    lse = scores.logsumexp(dim=-1)
    weights = torch.where(sees, torch.exp(scores - lse[..., None]), 0.0)
    return torch.einsum("bghmn,bnghd->bmghd", weights, clean).to(query.dtype), lse.float()


def dense_merge(outs: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = sums.double().logsumexp(dim=0)
    weights = torch.exp(sums.double() - lse).permute(0, 1, 4, 2, 3)[..., None]
    return (outs.double() * weights).sum(dim=0).to(outs.dtype), lse.float()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers, "partial", dense_partial)
    monkeypatch.setattr(xformers, "merge", dense_merge)
    monkeypatch.setattr(xformers, "_check", lambda problem: None)


def memory_of(num_blocks: int, block_size: int = 16, seed: int = 0) -> Memory:
    """Block 0 pads xFormers' tables, and what is materialized writes it last: keep it free."""
    memory = Memory(num_blocks, block_size, seed)
    memory.free.remove(0)
    return memory


def check(case: Case, plan: SegmentPlan | None = None, device: str = "cpu") -> None:
    expected, expected_lse = oracle(case)
    plan = SegmentPlan.build(case.rows, case.block_size, device) if plan is None else plan
    out, lse = segmented_attention(
        case.query.to(device), case.key_cache.to(device), case.value_cache.to(device), plan,
        scale=case.scale, rotary=case.rotary, provider="xformers",
    )  # fmt: skip
    assert lse is not None
    if out.numel() == 0:
        return
    budget = 2 * (same_precision(case).double() - expected).abs().max() + 1e-6
    assert (out.cpu().double() - expected).abs().max() <= budget
    tolerance = 1e-5 if case.query.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-6, atol=tolerance)


def mixed_rows(memory: Memory) -> list[Row]:
    shared, start = memory.segment(70), memory.segment(21, first_slot=7)
    return [
        Row(1, (shared, memory.segment(13), memory.segment(0), memory.segment(5))),
        Row(3, (shared, start, memory.segment(3))),
        Row(0, ()),
        Row(33, (memory.segment(64), memory.segment(64, first_slot=3))),
        Row(1, (memory.segment(1),)),
    ]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_masks_say_what_the_plan_says(block_size: int) -> None:
    memory = memory_of(60, block_size)
    check(memory.case(mixed_rows(memory)))


@pytest.mark.usefixtures("on_cpu")
def test_shifts_turn_the_query_of_a_part() -> None:
    memory = memory_of(60)
    shared = memory.segment(32)
    rows = [
        Row(2, (replace(shared, shift=5), replace(shared, shift=(7, -3)), memory.segment(2))),
        Row(1, (shared, memory.segment(16, shift=100), memory.segment(3))),
    ]
    check(memory.case(rows, rotary=make_rotary()))


@pytest.mark.usefixtures("on_cpu")
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_trees(data: st.DataObject) -> None:
    """Trees of depth 3: rows at the leaves read a prefix, an inner path and their own tokens."""
    memory = memory_of(160, seed=data.draw(st.integers(0, 1000)))

    def some() -> Segment:
        return memory.segment(data.draw(st.integers(0, 50)))

    rows = []
    prefix = some()
    for _ in range(data.draw(st.integers(1, 3))):
        inner = some()
        for _ in range(data.draw(st.integers(1, 3))):
            query_len = data.draw(st.integers(0, 4))
            own = memory.segment(query_len + data.draw(st.integers(0, 20)))
            rows.append(Row(query_len, (prefix, inner, own)))
    check(memory.case(rows, heads=(4, 2)))


def test_a_limit_of_sight_is_refused() -> None:
    memory = memory_of(20)
    rows = [Row(1, (memory.segment(20, visible=(3,)), memory.segment(1)))]
    with pytest.raises(ValueError, match="row 0: the xformers provider cannot limit"):
        xformers.make_calls(SegmentPlan.build(rows))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_is_refused() -> None:
    memory = memory_of(20)
    with pytest.raises(ValueError, match=r"needs CUDA.*take torch or cpu"):
        check(memory.case([Row(1, (memory.segment(4),))]))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="xFormers attends on CUDA only: `make test` on a GPU"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_own_operators(dtype: torch.dtype) -> None:
    memory = memory_of(60)
    check(memory.case(mixed_rows(memory), dim=64, dtype=dtype, transposed=False), device="cuda")
