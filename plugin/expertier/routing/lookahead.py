"""Next-layer lookahead: the next layer's gate applied to this layer's gate input."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_MEMORY = 0.98  # weight of the past in the running precision of each rank


class Lookahead:
    """Predicts the experts of the next MoE layer from the present one's gate input; needs no training.

    Parameters
    ----------
    gates : mapping of int to ndarray of float32, shape (experts, hidden)
        Router weights by layer.
    norms : mapping of int to ndarray of float32, shape (hidden,)
        Weights of the norm in front of each layer's experts. The gate input of layer l carries l's norm; dividing it
        out and applying that of l+1 is the correction of LN_{l+1} (Speculating Experts, arXiv 2603.19289). Layers
        without an entry are not corrected.
    top_k : mapping of int to int
        Experts used per token by layer.

    Notes
    -----
    The chance of a candidate is not read off the gate's scores, which belong to another layer's input, but measured:
    a running average of how often an absent candidate at that rank was really used. Only absent ones count, because
    the resident ones are the likelier half and say nothing about what a prefetch would bring.
    """

    def __init__(
        self,
        *,
        gates: Mapping[int, NDArray[np.float32]],
        norms: Mapping[int, NDArray[np.float32]],
        top_k: Mapping[int, int],
    ) -> None:
        layers = sorted(gates)
        self._next = dict(itertools.pairwise(layers))
        self._weights: dict[int, NDArray[np.float32]] = {}
        for layer, following in self._next.items():
            weight = gates[following]
            if layer in norms and following in norms:
                here = norms[layer]
                correction = norms[following] / np.where(here == 0, 1, here)
                weight = weight * correction.astype(np.float32)
            self._weights[layer] = np.ascontiguousarray(weight, np.float32)
        self._top_k = dict(top_k)
        self._precision = {layer: np.full(2 * top_k[layer], 0.5) for layer in layers}
        self._pending: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def predict(
        self, layer: int, hidden: NDArray[np.float32], resident: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rank the absent experts of the layer after `layer`.

        Parameters
        ----------
        layer : int
            A layer that has a successor (see :meth:`following`).
        hidden : ndarray of float32, shape (hidden,)
            Its gate input.
        resident : ndarray of bool, shape (experts,)
            Which experts of the following layer need no load.

        Returns
        -------
        experts : ndarray of int64, shape (n,)
            Absent candidates, likeliest first; n is at most twice the experts used per token.
        chances : ndarray of float64, shape (n,)
            How often an absent candidate of this rank was used lately.
        """
        following = self._next[layer]
        scores = self._weights[layer] @ hidden
        width = min(2 * self._top_k[following], len(scores))
        best = np.argpartition(-scores, width - 1)[:width]
        best = best[np.argsort(-scores[best])].astype(np.int64)
        ranks = np.flatnonzero(~resident[best])
        candidates = best[ranks]
        self._pending = (following, candidates, ranks)
        return candidates, self._precision[following][ranks]

    def following(self, layer: int) -> int | None:
        """The MoE layer after `layer`, or ``None``."""
        return self._next.get(layer)

    def learn(self, layer: int, experts: NDArray[np.int64]) -> None:
        """Compare the last prediction with what the router of `layer` chose for the token."""
        if self._pending is None or self._pending[0] != layer:
            return
        _, candidates, ranks = self._pending
        self._pending = None
        right = (candidates[:, None] == experts).any(axis=1)
        precision = self._precision[layer]
        precision[ranks] = _MEMORY * precision[ranks] + (1.0 - _MEMORY) * right

    def precision(self, layer: int) -> NDArray[np.float64]:
        """Running precision of absent candidates by rank for a layer, shape ``(2 * top_k,)``."""
        return self._precision[layer].copy()
