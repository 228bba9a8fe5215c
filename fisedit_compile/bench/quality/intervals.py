"""Means and medians of a sample with the interval in which they lie, by bootstrapping.

Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, section 13: the percentile interval.  A
resample draws as many values as there are, with replacement; the interval holds the middle 95 % of their statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 5000

Statistic = Literal["mean", "median", "least"]


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample.

    Attributes:
        value: the statistic.
        low, high: the bounds of its 95 % interval.
        count: how many values the sample has.
    """

    value: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float], statistic: Statistic = "mean") -> Estimate | None:
    """A statistic of values and its 95 % interval; None without values.

    Values may be infinite, as the ratio of signal to noise of equal pictures is: a median needs only their order.
    ``least`` is the smallest value, which has no interval to speak of: both bounds are the value.
    """
    if not values:
        return None
    sample = np.asarray(values, dtype=np.float64)
    if statistic == "least":
        least = float(sample.min())
        return Estimate(least, least, least, len(sample))
    drawn = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
    found = np.sort(_along_rows(sample[drawn], statistic))
    outside = (1 - CONFIDENCE) / 2
    low, high = (math.floor(share * (RESAMPLES - 1)) for share in (outside, 1 - outside))
    # Order statistics without interpolation: between two infinite values there is nothing to interpolate.
    value = float(_along_rows(sample[None], statistic)[0])
    return Estimate(value, float(found[low]), float(found[high]), len(sample))


def _along_rows(samples: NDArray[np.float64], statistic: Statistic) -> NDArray[np.float64]:
    """The statistic of each row of ``[resamples, values]``."""
    if statistic == "mean":
        return np.asarray(samples.mean(axis=1))
    ordered = np.sort(samples, axis=1)
    count = ordered.shape[1]
    lower, upper = ordered[:, (count - 1) // 2], ordered[:, count // 2]
    # Equal ones apart, since the mean of two infinite values is one of them and not what a sum gives.
    return np.where(lower == upper, lower, (lower + upper) / 2)


def paired_difference(values: Sequence[float], references: Sequence[float]) -> Estimate | None:
    """The mean of the differences of values to references of the same cases, and its 95 % interval.

    Pairs in which either is infinite have no difference that could be averaged, and are left out.  None without pairs.
    """
    pairs = zip(values, references, strict=True)
    return estimate([left - right for left, right in pairs if math.isfinite(left) and math.isfinite(right)])
