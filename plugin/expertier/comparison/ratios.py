"""Ratios of two arms, and medians where something may be unknown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two arms, paired repeat by repeat: median, smallest and largest."""

    median: float
    low: float
    high: float


def ratio(pairs: Sequence[tuple[float, float]]) -> Ratio | None:
    """Summarise pairs of a figure above and one below; ``None`` without any."""
    ratios = [above / below for above, below in pairs if below]
    return Ratio(median=median(ratios), low=min(ratios), high=max(ratios)) if ratios else None


def median_of_known(values: Iterable[float | None]) -> float | None:
    """Return the median of what is known; ``None`` if nothing is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None
