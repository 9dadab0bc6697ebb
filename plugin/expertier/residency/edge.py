"""EdgeMoE's rule: use frequency over the distance to the layer's next turn."""

from __future__ import annotations

import numpy as np

from expertier.residency.base import ExpertSpace, FloatArray, IntArray

_WARM_TOKENS = 1024  # what an earlier run found counts as if it had been so long


class Edge:
    """Evicts the lowest ``frequency / max(1, (layer - current layer) mod layers)``.

    Counts are cumulative, as in the paper.

    Notes
    -----
    EdgeMoE (arXiv 2308.14352, expert buffer eviction) prints a score that divides by zero at the current layer and
    keeps the layer that has just run instead of the one that comes next. This is the stated intent: an expert
    matters more the more often it is used and the sooner its layer runs again.
    """

    name = "edge"

    def __init__(self, space: ExpertSpace) -> None:
        self._layer_of = space.layer_of
        self._layers = space.layers
        self._count = np.zeros(len(space))
        self._tokens = 0

    def touch(self, experts: IntArray, ages: FloatArray | None = None) -> None:
        np.add.at(self._count, experts, 1.0)

    def advance(self, tokens: int) -> None:
        self._tokens += tokens

    def keep_scores(self, experts: IntArray, layer: int) -> FloatArray:
        distance = np.maximum((self._layer_of[experts] - layer) % self._layers, 1)
        result: FloatArray = self._count[experts] / distance
        return result

    def use_probability(self, experts: IntArray) -> FloatArray:
        return np.minimum(self._count[experts] / max(self._tokens, 1), 1.0)

    def warm(self, chances: FloatArray) -> None:
        self._tokens = _WARM_TOKENS
        self._count = chances * _WARM_TOKENS
