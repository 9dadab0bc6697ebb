"""Confidence intervals over texts: a small sample must not promise too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_TEXTS = 4
"""Below this an interval says nothing."""

_RESAMPLES = 4000
_SEED = 20230829  # the same texts give the same promise
_Z = 1.6449  # of the normal distribution, 95 % one-sided


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with a 90 % confidence interval: one-sided, `high` holds at 95 %."""

    low: float
    middle: float
    high: float

    def map(self, function: Callable[[float], Any]) -> Interval:
        """Apply an increasing function."""
        return Interval(
            low=float(function(self.low)), middle=float(function(self.middle)), high=float(function(self.high))
        )


def bootstrap(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> Interval:
    """Estimate sum(sums) / sum(weights), resampling texts.

    Parameters
    ----------
    sums : ndarray of float64, shape (texts,)
        A figure summed over each text.
    weights : ndarray of float64, shape (texts,)
        Tokens of each text.

    Returns
    -------
    Interval
        Infinite to both sides with fewer than :data:`LEAST_TEXTS` texts.

    Notes
    -----
    Percentiles of a bootstrap over few texts are too narrow: it has the sample's own variance, which is short by
    (n - 1) / n, and normal tails. Both are put right by widening the percentiles' distances from the estimate by
    sqrt(n / (n - 1)) and by Student's t over the normal quantile (Efron and Tibshirani 1993, chapter 12).
    """
    count = len(sums)
    middle = float(sums.sum() / weights.sum())
    if count < LEAST_TEXTS:
        return Interval(low=-np.inf, middle=middle, high=np.inf)
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    low, high = np.percentile((drawn @ sums) / (drawn @ weights), (5, 95))
    wider = np.sqrt(count / (count - 1)) * student(count - 1) / _Z
    return Interval(
        low=middle - wider * (middle - float(low)), middle=middle, high=middle + wider * (float(high) - middle)
    )


def student(freedom: int) -> float:
    """Quantile of Student's t distribution, 95 % one-sided.

    Hill's expansion about the normal quantile (Abramowitz and Stegun 26.7.5): within 1 % from three degrees of freedom.
    """
    z, n = _Z, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
