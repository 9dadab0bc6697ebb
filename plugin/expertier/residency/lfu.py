"""Least frequently used with a half-life in tokens: the best causal frequency policy measured on trained routers."""

from __future__ import annotations

import numpy as np

from expertier.residency.base import ExpertSpace, FloatArray, IntArray

DEFAULT_HALF_LIFE = 16.0
_RENORMALISE_AT = 512.0


class LFU:
    """Evicts the expert with the lowest exponentially decayed use count.

    Parameters
    ----------
    space : ExpertSpace
        The model's experts.
    half_life : float
        Tokens after which a use counts half.

    Notes
    -----
    Instead of decaying all counts at every token, uses are added with a weight that grows as ``2**(t/half_life)``;
    the order is the same and a touch costs only what it touches. Weights are rescaled before they overflow.
    """

    name = "lfu"

    def __init__(self, space: ExpertSpace, half_life: float = DEFAULT_HALF_LIFE) -> None:
        self.half_life = half_life
        self._count = np.zeros(len(space))
        self._now = 0.0  # in half-lives since the last renormalisation
        self._steady = 1.0 - 2.0 ** (-1.0 / half_life)

    def touch(self, experts: IntArray, ages: FloatArray | None = None) -> None:
        if ages is None:
            self._count[experts] += 2.0**self._now
            return
        np.add.at(self._count, experts, np.exp2(self._now - ages / self.half_life))

    def advance(self, tokens: int) -> None:
        self._now += tokens / self.half_life
        if self._now > _RENORMALISE_AT:
            self._count *= 2.0**-self._now
            self._now = 0.0

    def keep_scores(self, experts: IntArray, layer: int) -> FloatArray:
        return self._count[experts]

    def use_probability(self, experts: IntArray) -> FloatArray:
        return np.minimum(self.rate(experts), 1.0)

    def rate(self, experts: IntArray | slice) -> FloatArray:
        """Estimated uses per step; with several sequences in a step there may be more than one."""
        # An expert used p times per step settles at a decayed count of p / (1 - 2**(-1/half_life)).
        result: FloatArray = self._count[experts] * (self._steady * 2.0**-self._now)
        return result

    def warm(self, chances: FloatArray) -> None:
        self._count = chances * (2.0**self._now / self._steady)
