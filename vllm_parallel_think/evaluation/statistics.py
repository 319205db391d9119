"""Statistics of the exam: intervals, paired differences, tests, and their correction for many.

The unit is the problem: the seeds of one problem are averaged first, as they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0
CHUNK = 500
"""Resamples at a time, so that memory stays small."""
EXACT_FLIPS = 12
"""Up to so many differences all signs are tried; beyond, :data:`RESAMPLES` random ones."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        value: The mean over problems.
        low: Lower end of the interval.
        high: Upper end.
        num: Over how many problems.

    """

    value: float
    low: float
    high: float
    num: int


@dataclass(frozen=True)
class PairedDifference:
    """Two methods on the same problems.

    Attributes:
        difference: Mean of first minus second, with its bootstrap interval.
        p_flips: Two-sided p of the paired sign-flip test over problems.
        first_only: Problems that only the first method has right, of those where both have the
            first seed's answer.
        second_only: Problems that only the second has right.
        p_mcnemar: McNemar's exact p of these two counts.

    """

    difference: Estimate
    p_flips: float
    first_only: int
    second_only: int
    p_mcnemar: float


def wilson(right: int, num: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of a share after Wilson (J. Am. Stat. Assoc. 22, 1927)."""
    if not num:
        return 0.0, 1.0
    z, share = NormalDist().inv_cdf((1 + level) / 2), right / num
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def resampled_means(values: Values, resamples: int = RESAMPLES, seed: int = SEED) -> Values:
    """Return the means of samples drawn from the values with replacement."""
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(0, len(values), (min(CHUNK, resamples - done), len(values)))].mean(1)
        for done in range(0, resamples, CHUNK)
    ]
    return np.concatenate(means)


def bootstrap(
    values: Sequence[float],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    span: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Return a mean with its BCa interval (Efron, J. Am. Stat. Assoc. 82, 1987).

    Values that are all alike have no bootstrap interval. As many as Wilson's bound for a share of
    none may then be different, anywhere in the span: for shares of 0 and 1 that is his interval.

    Args:
        values: A value for each problem.
        level: Of the interval.
        resamples: How many samples are drawn.
        seed: Of the drawing.
        span: The least and the greatest that a value can be.

    """
    array = np.asarray(values, dtype=np.float64)
    mean = fmean(values)
    if np.all(array == array[0]):
        different = wilson(0, len(values), level)[1]
        low, high = (mean * (1 - different) + end * different for end in span)
        return Estimate(mean, low, high, len(values))
    means = np.sort(resampled_means(array, resamples, seed))
    normal = NormalDist()
    # Sums in another order differ in the last bit, so equal means are those that are very near.
    near = 1e-12 * max(1.0, abs(mean))
    below = np.sum(means < mean - near) + np.sum(np.abs(means - mean) <= near) / 2
    bias = normal.inv_cdf(min(max(below / resamples, 0.5 / resamples), 1 - 0.5 / resamples))
    # The jackknife of a mean: leaving out value x moves it by (mean - x) / (n - 1).
    moved = array - mean
    acceleration = float((moved**3).sum() / (6 * (moved**2).sum() ** 1.5))
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(share)
        ends.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends)
    return Estimate(mean, float(low), float(high), len(values))


def sign_flip_p(
    differences: Sequence[float], resamples: int = RESAMPLES, seed: int = SEED
) -> float:
    """Return the two-sided p of a mean difference if each sign could as well be the other.

    Exact for few differences that are not 0; else from random signs, the observed ones among them.
    """
    array = np.asarray([each for each in differences if each], dtype=np.float64)
    observed = abs(array.sum())
    near = observed - 1e-9
    if len(array) <= EXACT_FLIPS:
        bits = np.arange(2 ** len(array))[:, None] >> np.arange(len(array)) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ array) >= near))
    rng = np.random.default_rng(seed)
    as_far = 0
    for done in range(0, resamples, CHUNK):
        signs = 1 - 2 * rng.integers(0, 2, (min(CHUNK, resamples - done), len(array)))
        as_far += int(np.sum(np.abs(signs @ array) >= near))
    return (as_far + 1) / (resamples + 1)


def mcnemar(first_only: int, second_only: int) -> float:
    """Return McNemar's exact two-sided p of the problems that one method alone has right."""
    num = first_only + second_only
    tail = sum(math.comb(num, k) for k in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / 2**num)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, Scand. J. Stat. 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


Scores = Mapping[str, Mapping[int, bool]]
"""Whether an answer is right, by problem and seed."""


def means_of(scores: Scores) -> dict[str, float]:
    """Return each problem's mean over its seeds."""
    return {key: fmean(seeds.values()) for key, seeds in sorted(scores.items()) if seeds}


def compare(first: Scores, second: Scores) -> PairedDifference | None:
    """Compare two methods on the problems that both have answers to; ``None`` without any."""
    left, right = means_of(first), means_of(second)
    shared = sorted(set(left) & set(right))
    if not shared:
        return None
    differences = [left[key] - right[key] for key in shared]
    pairs = [
        (first[key][0], second[key][0]) for key in shared if 0 in first[key] and 0 in second[key]
    ]
    first_only = sum(a and not b for a, b in pairs)
    second_only = sum(b and not a for a, b in pairs)
    return PairedDifference(
        bootstrap(differences, span=(-1.0, 1.0)),
        sign_flip_p(differences),
        first_only,
        second_only,
        mcnemar(first_only, second_only),
    )
