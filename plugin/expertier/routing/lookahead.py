"""Next-layer lookahead: the next layer's gate applied to this layer's gate input."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.routing.products import times

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
        self._layers = layers
        self._gates, self._norms = dict(gates), dict(norms)
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
        # Layer, and for every absent candidate its token, expert and rank.
        self._pending: tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None

    def predict(
        self, layer: int, hidden: NDArray[np.float32], resident: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rank the absent experts of the layer after `layer`.

        Parameters
        ----------
        layer : int
            A layer that has a successor (see :meth:`following`).
        hidden : ndarray of float32, shape (hidden,) or (tokens, hidden)
            Its gate input.
        resident : ndarray of bool, shape (experts,)
            Which experts of the following layer need no load.

        Returns
        -------
        experts : ndarray of int64, shape (n,)
            Absent candidates, likeliest first; n is at most twice the experts used per token, for every token.
        chances : ndarray of float64, shape (n,)
            How often an absent candidate of this rank was used lately; that of at least one token using it when
            several rank it.
        """
        following = self._next[layer]
        scores = times(self._weights[layer], np.atleast_2d(hidden))
        width = min(2 * self._top_k[following], scores.shape[1])
        best = np.argpartition(-scores, width - 1, axis=1)[:, :width]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        best = np.take_along_axis(best, order, axis=1).astype(np.int64)
        tokens, ranks = np.nonzero(~resident[best])
        candidates = best[tokens, ranks]
        self._pending = (following, tokens, candidates, ranks)
        chances = self._precision[following][ranks]
        if len(scores) == 1:
            return candidates, chances
        missing = np.ones(scores.shape[1])  # chance that no token uses it
        np.multiply.at(missing, candidates, 1.0 - chances)
        unique = np.unique(candidates)
        unique = unique[np.argsort(missing[unique], kind="stable")]
        return unique, 1.0 - missing[unique]

    def scores(self, layer: int, hidden: NDArray[np.float32], *, ahead: int = 4) -> dict[int, NDArray[np.float32]]:
        """Score the experts of several later layers, for a predictor that mixes them with what else it knows.

        Parameters
        ----------
        layer : int
            The layer.
        hidden : ndarray of float32, shape (hidden,) or (tokens, hidden)
            Its gate input.
        ahead : int
            Later layers. Each costs as much as a router, and knows less than the one before it.

        Returns
        -------
        dict of int to ndarray of float32, shape (experts,) or (tokens, experts)
            By layer: what its router would say about this input under its own norm.
        """
        place = self._layers.index(layer)
        here = self._norms.get(layer)
        plain = hidden if here is None else hidden / np.where(here == 0, 1, here)
        found: dict[int, NDArray[np.float32]] = {}
        for later in self._layers[place + 1 : place + 1 + ahead]:
            norm = self._norms.get(later)
            given: NDArray[np.float32] = hidden if here is None or norm is None else plain * norm
            found[later] = times(self._gates[later], given)
        return found

    def following(self, layer: int) -> int | None:
        """The MoE layer after `layer`, or ``None``."""
        return self._next.get(layer)

    def learn(self, layer: int, routes: NDArray[np.int64]) -> None:
        """Compare the last prediction with what the router of `layer` chose.

        Parameters
        ----------
        layer : int
            The layer.
        routes : ndarray of int64, shape (top_k,) or (tokens, top_k)
            Its routes, for the tokens the prediction was made for.
        """
        if self._pending is None or self._pending[0] != layer:
            return
        _, tokens, candidates, ranks = self._pending
        self._pending = None
        table = np.atleast_2d(routes)
        if not ranks.size or tokens[-1] >= len(table):
            return
        right = (candidates[:, None] == table[tokens]).any(axis=1)
        seen = np.bincount(ranks, minlength=len(self._precision[layer]))
        hits = np.bincount(ranks, weights=right, minlength=len(seen))
        past = _MEMORY**seen  # so many observations at once
        share = np.divide(hits, seen, out=np.zeros(len(seen)), where=seen > 0)
        self._precision[layer] = past * self._precision[layer] + (1.0 - past) * share

    def precision(self, layer: int) -> NDArray[np.float64]:
        """Running precision of absent candidates by rank for a layer, shape ``(2 * top_k,)``."""
        return self._precision[layer].copy()

    def learned(self) -> dict[str, list[float]]:
        """Precisions by layer, for a later run to begin with (:meth:`warm`)."""
        return {str(layer): np.round(precision, 4).tolist() for layer, precision in self._precision.items()}

    def warm(self, learned: Mapping[str, Any]) -> None:
        """Begin with the precisions of an earlier run.

        Raises
        ------
        ValueError, KeyError, TypeError
            They are not of this model.
        """
        found = {layer: np.array(learned[str(layer)], np.float64) for layer in self._precision}
        for layer, precision in found.items():
            if precision.shape != self._precision[layer].shape or not ((precision >= 0) & (precision <= 1)).all():
                raise ValueError(f"not one precision for each rank of layer {layer}")
        self._precision = found
