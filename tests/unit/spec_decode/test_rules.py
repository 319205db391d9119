"""Every rule against a slow rule_reference, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spec_decode.acceptance import (
    accept,
    before_rejection,
    is_protected,
    standard_greedy,
    standard_sampled,
)
from spec_decode.draft_rows import DraftRows
from spec_decode.judge_head import JudgeHead
from spec_decode.rules import KL, RULES, FLy, Judge, TopNDelta, Typical, parameters
from tests.support import rule_reference
from tests.support.draft_samples import batches, make_rows

share = st.floats(0, 1, allow_nan=False)


def head(hidden_size: int = 5, seed: int = 3) -> JudgeHead:
    g = torch.Generator().manual_seed(seed)
    return JudgeHead(torch.randn(hidden_size, generator=g), torch.tensor(0.1), "tiny")


@given(batches, share)
@settings(max_examples=150, deadline=None)
def test_judge(rows: DraftRows, threshold: float) -> None:
    h = head()
    expected = rule_reference.each(
        rule_reference.judge, rows, h.weight.tolist(), float(h.bias), threshold
    )
    assert Judge(h, threshold)(rows).tolist() == expected


@given(batches, st.integers(1, 12), share)
@settings(max_examples=150, deadline=None)
def test_top_n_delta(rows: DraftRows, n: int, delta: float) -> None:
    expected = rule_reference.each(rule_reference.top_n_delta, rows, n, delta + 1e-6)
    assume(expected == rule_reference.each(rule_reference.top_n_delta, rows, n, delta - 1e-6))
    assert TopNDelta(n, delta)(rows).tolist() == expected


@given(batches, share, share)
@settings(max_examples=150, deadline=None)
def test_typical(rows: DraftRows, epsilon: float, alpha: float) -> None:
    expected = rule_reference.each(rule_reference.typical, rows, epsilon, alpha)
    assume(
        expected == rule_reference.each(rule_reference.typical, rows, epsilon + 1e-6, alpha + 1e-6)
    )
    assert Typical(epsilon, alpha)(rows).tolist() == expected


@given(batches, st.floats(0.01, 3), share)
@settings(max_examples=150, deadline=None)
def test_kl(rows: DraftRows, tau: float, max_top: float) -> None:
    expected = rule_reference.each(rule_reference.kl, rows, tau - 1e-5, max_top - 1e-6)
    assume(expected == rule_reference.each(rule_reference.kl, rows, tau + 1e-5, max_top + 1e-6))
    assert KL(tau, max_top)(rows).tolist() == expected


@given(batches, share, st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_fly(rows: DraftRows, entropy: float, window: int) -> None:
    expected = rule_reference.each(rule_reference.fly, rows, entropy - 1e-6, window)
    assume(expected == rule_reference.each(rule_reference.fly, rows, entropy + 1e-6, window))
    assert FLy(entropy, window)(rows).tolist() == expected


def test_references_see_both_outcomes() -> None:
    """The random rows are neither all accepted nor all refused."""
    rows = make_rows(1, [6] * 40)
    h = head()
    outcomes = [
        rule_reference.each(rule_reference.judge, rows, h.weight.tolist(), float(h.bias), 0.5),
        rule_reference.each(rule_reference.top_n_delta, rows, 3, 0.3),
        rule_reference.each(rule_reference.typical, rows, 0.09, 0.3),
        rule_reference.each(rule_reference.kl, rows, 0.3, 0.9),
        rule_reference.each(rule_reference.fly, rows, 0.3, 2),
    ]
    assert all(0.05 < sum(outcome) / len(outcome) < 0.95 for outcome in outcomes)


@given(batches, st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_accept(rows: DraftRows, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = rows.draft_ids.shape[0]
    standard, lossy, protected = (torch.rand(n, generator=g) < p for p in (0.6, 0.6, 0.3))
    kept = accept(rows, standard, lossy, protected)
    lists = [mask.tolist() for mask in (standard, lossy, protected)]
    assert kept.tolist() == rule_reference.accepted(rows, *lists)
    # Nothing lossy: the standard rule, and a lossy rule never keeps less.
    without = accept(rows, standard)
    assert bool((kept | ~without).all())
    assert accept(rows, standard, lossy, torch.ones(n, dtype=torch.bool)).equal(without)


@given(batches, st.integers(0, 2**31), st.sampled_from([0.3, 1.0, 2.0]))
@settings(max_examples=100, deadline=None)
def test_standard_tests(rows: DraftRows, seed: int, temperature: float) -> None:
    n = rows.draft_ids.shape[0]
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    sampled = standard_sampled(rows, torch.full((n,), temperature), uniform).tolist()
    greedy = standard_greedy(rows).tolist()
    for i, x in enumerate(rows.draft_ids.tolist()):
        logits = rows.logits[i].tolist()
        assert greedy[i] == (rule_reference.argmax(logits) == x)
        if x < 0:
            assert not sampled[i]
            continue
        ratio = rule_reference.softmax(logits, temperature)[x]
        if rows.draft_logits is not None:
            ratio /= rule_reference.softmax(rows.draft_logits[i].tolist(), temperature)[x]
        if abs(ratio - float(uniform[i])) > 1e-5:
            assert sampled[i] == (uniform[i] < ratio)


@given(st.lists(st.lists(st.booleans(), max_size=5), max_size=5))
def test_cut_at_the_first_rejection(requests: list[list[bool]]) -> None:
    passed = torch.tensor([ok for request in requests for ok in request], dtype=torch.bool)
    position = torch.tensor([j for request in requests for j in range(len(request))]).long()
    expected = [all(r[: j + 1]) for r in requests for j in range(len(r))]
    assert before_rejection(passed, position).tolist() == expected


def test_protected_tokens() -> None:
    protected_ids = torch.zeros(2, 6, dtype=torch.bool)
    protected_ids[0, [2, 5]] = True
    protected_ids[1, [0, 2, 5]] = True
    ids = torch.tensor([0, 2, -1, 5, 3, 0], dtype=torch.int32)
    grammar = torch.tensor([0, 0, 0, 0, 1, 1])
    expected = [False, True, True, True, False, True]
    assert is_protected(ids, protected_ids, grammar).tolist() == expected


@given(batches)
@settings(max_examples=50, deadline=None)
def test_rows_decide_for_themselves(rows: DraftRows) -> None:
    """A rule's verdict on a request does not depend on who else is in the batch."""
    rules: list[Any] = [Judge(head()), TopNDelta(3), Typical(), KL(), FLy(window=2)]
    for rule in rules:
        together = rule(rows)
        for request in rows.request.unique().tolist():
            mine = rows.request == request
            fields = {
                name: None if (value := getattr(rows, name)) is None else value[mine]
                for name in rows.__dataclass_fields__
            }
            assert rule(DraftRows(**fields)).equal(together[mine])


def test_half_precision_logits() -> None:
    """Rules compute in float32 whatever the model's precision."""
    rows = make_rows(5, [4] * 30, filler=0)
    half = replace(rows, logits=rows.logits.bfloat16(), draft_logits=None)
    same = replace(half, logits=half.logits.float())
    for rule in (TopNDelta(3, 0.3), Typical(), FLy(window=1)):
        assert rule(half).equal(rule(same))


def test_a_row_can_only_raise_the_threshold() -> None:
    rows = make_rows(2, [5] * 8)
    n = rows.draft_ids.shape[0]
    rule = Judge(head(), 0.5)
    lower = replace(rows, threshold=torch.full((n,), 0.1))
    higher = replace(rows, threshold=torch.full((n,), 0.9))
    assert rule(lower).equal(rule(rows))
    assert rule(higher).equal(Judge(head(), 0.9)(rows))
    assert not rule(higher).equal(rule(rows))


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("judge", {"head": head(), "threshold": 1.5}, "threshold must be a number between 0 and 1"),
        ("judge", {"head": head(), "threshold": float("nan")}, "got nan"),
        ("judge", {"head": head(), "threshold": "0.5"}, "got '0.5'"),
        ("top_n_delta", {"n": 0}, "n must be a whole number of at least 1, got 0"),
        ("top_n_delta", {"n": True}, "got True"),
        ("top_n_delta", {"delta": -0.1}, "delta must be a number between 0 and 1"),
        ("typical", {"epsilon": 2}, "epsilon"),
        ("typical", {"alpha": None}, "alpha must be a number between 0 and 1, got None"),
        ("kl", {"tau": 0}, "tau must be a number above 0"),
        ("kl", {"max_top": 1.1}, "max_top"),
        ("fly", {"entropy": 7}, "entropy"),
        ("fly", {"window": 0}, "window must be a whole number of at least 1"),
    ],
)
def test_bad_parameters(name: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RULES[name](**values)


def test_names_of_parameters() -> None:
    assert parameters("judge") == ("head", "threshold")
    assert parameters("fly") == ("entropy", "window")


def test_rows_that_do_not_fit() -> None:
    rows = make_rows(0, [3, 2])
    with pytest.raises(ValueError, match="hidden has 4 rows, draft_ids 5"):
        replace(rows, hidden=torch.zeros(4, 5))
    with pytest.raises(ValueError, match="shape of logits"):
        replace(rows, draft_logits=torch.zeros(5, 3))
    with pytest.raises(ValueError, match="hidden states of the draft tokens"):
        Judge(head())(replace(rows, hidden=None))
