"""The attention providers that this machine can run, and their test against the oracle."""

from __future__ import annotations

import os

import torch

from attention_kernels import SegmentPlan, segmented_attention
from tests.support.segment_cases import Case, oracle, same_precision

if os.environ.get("TRITON_INTERPRET") == "1":
    PROVIDERS = ["triton"]
elif torch.cuda.is_available():
    PROVIDERS = ["torch", "cpu", "triton"]
else:
    PROVIDERS = ["torch", "cpu"]


def device_of(provider: str) -> str:
    """Return where a provider's tensors live."""
    return "cuda" if provider == "triton" and torch.cuda.is_available() else "cpu"


def run(
    case: Case, provider: str, plan: SegmentPlan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a provider's output and log-sum-exp, on the CPU."""
    device = device_of(provider)
    if plan is None:
        plan = SegmentPlan.build(case.rows, case.block_size, device)
    out, lse = segmented_attention(
        case.query.to(device),
        case.key_cache.to(device),
        case.value_cache.to(device),
        plan,
        scale=case.scale,
        rotary=case.rotary,
        provider=provider,
    )
    assert lse is not None
    return out.cpu(), lse.cpu()


def check(case: Case, provider: str) -> None:
    """At most twice the error of the same-precision torch version, plus a little."""
    expected, expected_lse = oracle(case)
    out, lse = run(case, provider)
    if out.numel() == 0:
        return
    budget = 2 * (same_precision(case).double() - expected).abs().max() + 1e-6
    assert not out.isnan().any()
    assert (out.double() - expected).abs().max() <= budget
    tolerance = 1e-5 if case.query.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=tolerance)
