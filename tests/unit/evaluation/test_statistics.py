"""Statistics of the exam against closed forms, scipy, and everything that can be counted out."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest
from scipy import stats

from vllm_parallel_think.evaluation.statistics import (
    bootstrap,
    compare,
    holm,
    mcnemar,
    means_of,
    resampled_means,
    sign_flip_p,
    wilson,
)


@pytest.mark.parametrize(("right", "num"), [(0, 1), (1, 1), (3, 10), (0, 40), (40, 40), (57, 128)])
def test_wilson_is_scipys(right: int, num: int) -> None:
    expected = stats.binomtest(right, num).proportion_ci(0.95, method="wilson")
    assert wilson(right, num) == pytest.approx(tuple(expected), abs=1e-9)


def test_no_answers_leave_everything_open() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 0), (7, 2), (12, 12), (3, 40)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    num = first + second
    expected = stats.binomtest(first, num).pvalue if num else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)


def test_mcnemar_in_closed_form() -> None:
    assert mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)


def step_down(p_values: list[float]) -> list[float]:
    """Return Holm's p by its definition: the smallest level that rejects a hypothesis."""

    def rejected(level: float) -> set[int]:
        order = sorted(range(len(p_values)), key=lambda i: p_values[i])
        found: set[int] = set()
        for rank, index in enumerate(order):
            if p_values[index] > level / (len(p_values) - rank) + 1e-12:
                break
            found.add(index)
        return found

    levels = sorted({min(1.0, p * k) for p in p_values for k in range(1, len(p_values) + 1)})
    return [next((a for a in levels if i in rejected(a)), 1.0) for i in range(len(p_values))]


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_its_definition(seed: int) -> None:
    rng = random.Random(seed)
    p_values = [round(rng.random() ** 3, 3) for _ in range(rng.randint(1, 8))]
    assert holm(p_values) == pytest.approx(step_down(p_values))


def test_holm_of_a_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_sign_flips_counted_out() -> None:
    differences = [0.5, -0.25, 1.0, 0.0, 0.75, 0.5]
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    observed = abs(sum(differences))
    expected = sum(each >= observed - 1e-12 for each in sums) / len(sums)
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_random_sign_flips_are_near_scipys() -> None:
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, -0.5, 0.5, 1.0], size=60, p=[0.15, 0.2, 0.3, 0.35])
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1
    )
    assert sign_flip_p(list(differences)) == pytest.approx(expected.pvalue, abs=0.01)


def test_without_differences_there_is_no_evidence() -> None:
    assert sign_flip_p([0.0, 0.0]) == 1.0 and sign_flip_p([]) == 1.0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_bootstrap_is_near_scipys(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    values = rng.binomial(4, share, size=120) / 4
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="BCa", rng=1
    ).confidence_interval
    found = bootstrap(list(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(expected.low, abs=0.006)
    assert found.high == pytest.approx(expected.high, abs=0.006)


def test_bootstrap_of_many_is_the_normal_interval() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, size=2000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    found = bootstrap(list(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_resampled_means_have_the_binomials_spread() -> None:
    means = resampled_means(np.array([0.0] * 30 + [1.0] * 10))
    assert means.mean() == pytest.approx(0.25, abs=0.003)
    assert means.std() == pytest.approx(math.sqrt(0.25 * 0.75 / 40), rel=0.03)


def test_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        found = bootstrap(list(rng.random(40) < 0.7), resamples=500)
        covered += found.low <= 0.7 <= found.high
    assert 180 <= covered <= 199


def test_values_that_are_alike_have_wilsons_interval() -> None:
    found = bootstrap([1.0] * 20)
    assert (found.low, found.high) == pytest.approx(wilson(20, 20)) and found.low < 0.9
    found = bootstrap([0.0] * 20)
    assert (found.low, found.high) == pytest.approx(wilson(0, 20))
    found = bootstrap([0.25] * 3)
    assert 0 < found.low < 0.25 < found.high < 1


def test_differences_that_are_alike_may_go_either_way() -> None:
    scores = {str(n): {0: True} for n in range(20)}
    found = compare(scores, scores)
    assert found is not None
    bound = wilson(0, 20)[1]
    assert (found.difference.low, found.difference.high) == pytest.approx((-bound, bound))
    found = compare(scores, {key: {0: False} for key in scores})
    assert found is not None
    assert (found.difference.low, found.difference.high) == pytest.approx((1 - 2 * bound, 1))


def test_a_pair_is_compared_on_what_both_answered() -> None:
    first = {"a": {0: True, 1: True}, "b": {0: True, 1: False}, "c": {0: True}}
    second = {"a": {0: False, 1: True}, "b": {0: True}, "d": {0: True}}
    found = compare(first, second)
    assert found is not None
    assert found.difference.value == pytest.approx((0.5 - 0.5) / 2)
    assert (found.first_only, found.second_only, found.p_mcnemar) == (1, 0, 1.0)
    assert compare({"a": {0: True}}, {"b": {0: True}}) is None


def test_seeds_are_averaged_first() -> None:
    scores = {"b": {0: True, 1: False}, "a": {0: True, 1: True, 2: True, 3: False}}
    assert means_of(scores) == {"a": 0.75, "b": 0.5}
