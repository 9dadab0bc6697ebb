"""Least recently used: the control every other policy has to beat."""

from __future__ import annotations

import numpy as np

from expertier.residency.base import ExpertSpace, FloatArray, IntArray

_RAREST = 1e-9


class LRU:
    """Evicts the expert whose last use is oldest.

    Within one token, later layers count as more recent: layers run in order, so the clock also advances by a
    fraction of a token per layer.
    """

    name = "lru"

    def __init__(self, space: ExpertSpace) -> None:
        self._now = 0.0
        self._last = np.full(len(space), -np.inf)
        self._offset = space.layer_of / max(1, space.layers)

    def touch(self, experts: IntArray, ages: FloatArray | None = None) -> None:
        if ages is None:
            self._last[experts] = self._now + self._offset[experts]
            return
        np.maximum.at(self._last, experts, self._now - ages + self._offset[experts])

    def advance(self, tokens: int) -> None:
        self._now += tokens

    def keep_scores(self, experts: IntArray, layer: int) -> FloatArray:
        return self._last[experts]

    def use_probability(self, experts: IntArray) -> FloatArray:
        age = np.maximum(self._now + 1.0 - self._last[experts], 0.0)
        result: FloatArray = 1.0 / (1.0 + age)
        return result

    def warm(self, chances: FloatArray) -> None:
        self._last = self._now - 1.0 / np.maximum(chances, _RAREST)
