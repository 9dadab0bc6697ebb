"""Frequency over staleness: the policy most engines' expert caches converge on, kept for comparison."""

from __future__ import annotations

import numpy as np

from expertier.residency.base import ExpertSpace, FloatArray, IntArray
from expertier.residency.lfu import LFU
from expertier.residency.lru import LRU


class LFRU:
    """Evicts the lowest ``decayed count / (1 + tokens since last use)``.

    Parameters
    ----------
    space : ExpertSpace
        The model's experts.
    half_life : float
        Half-life of the counts in tokens; longer than plain LFU's because recency is counted separately.
    """

    name = "lfru"

    def __init__(self, space: ExpertSpace, half_life: float = 64.0) -> None:
        self._frequency = LFU(space, half_life)
        self._recency = LRU(space)

    def touch(self, experts: IntArray, ages: FloatArray | None = None) -> None:
        self._frequency.touch(experts, ages)
        self._recency.touch(experts, ages)

    def advance(self, tokens: int) -> None:
        self._frequency.advance(tokens)
        self._recency.advance(tokens)

    def keep_scores(self, experts: IntArray, layer: int) -> FloatArray:
        result: FloatArray = self._frequency.keep_scores(experts, layer) * self._recency.use_probability(experts)
        return result

    def use_probability(self, experts: IntArray) -> FloatArray:
        return np.asarray(self._frequency.use_probability(experts))

    def warm(self, chances: FloatArray) -> None:
        self._frequency.warm(chances)
