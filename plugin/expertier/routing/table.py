"""Predictors that count: EdgeMoE's table keyed on the experts of the two previous layers, and one keyed on the token.

EdgeMoE (arXiv 2308.14352) looks up the experts of the two previous layers together. A model that uses one of a few
experts has few such keys; with four of 32 nearly every key is new. There the table backs off to a chance that is linear
in both sets of experts. It follows from counts, too: of every pair of experts, how often they are used together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from expertier.routing.history import History
from expertier.routing.predictor import HORIZONS, Chances, Forecast, RoutedModel, Scores
from expertier.routing.windows import Windows

Array = NDArray[np.float32]

_AHEAD: Final = 4  # layers that the table looks ahead: guesses about guesses fade
_MOST_KEYED: Final = 1 << 24  # numbers in a table of whole keys; beyond it there is only the linear one
_KEY_TRUST: Final = 8.0  # sightings of a key at which it counts as much as the linear guess
_RIDGE: Final = 10.0
_TOKEN_TRUST: Final = 1.0  # sightings of a token at which it counts as much as the frequencies
_BLOCK: Final = 4096  # tokens counted at a time


def frequency_forecast(frequency: Array) -> Forecast:
    """Return a forecast that knows only how often each expert is used, shape ``(layers, experts)``."""
    soon = np.stack([1.0 - (1.0 - frequency) ** horizon for horizon in HORIZONS])
    return Forecast(now=frequency.copy(), soon=soon.astype(np.float32))


# ---- the two previous layers


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """Counts of a trace, ready to look up.

    Attributes
    ----------
    frequency : ndarray of float32, shape (layers, experts)
        Share of tokens that use each expert.
    linear : ndarray of float32, shape (layers, 2 * experts + 1, experts)
        What each expert of the layer before, of the one before that, and a constant add to the chances.
    keyed : ndarray of float32, shape (layers, experts**2, experts), or empty
        Of models that use one expert per token: counts by (layer before that, layer before).
    """

    frequency: Array
    linear: Array
    keyed: Array

    def arrays(self) -> dict[str, Array]:
        """Return what is saved."""
        return {"frequency": self.frequency, "linear": self.linear, "keyed": self.keyed}


def count_layers(windows: Windows) -> LayerTable:
    """Count which experts follow which.

    Parameters
    ----------
    windows : Windows
        Routes; token ids are not needed.
    """
    model = windows.model
    layers, experts = model.shape
    routes = windows.routes.reshape(-1, *windows.routes.shape[2:])
    routes = routes[(routes[..., 0] >= 0).all(1)]
    width = 2 * experts + 1
    together = np.zeros((layers, width, width))
    towards = np.zeros((layers, width, experts))
    for start in range(0, len(routes), _BLOCK):
        sets = _multi_hot(routes[start : start + _BLOCK], experts)
        for place in range(layers):
            inputs = _inputs(sets, place)
            together[place] += inputs.T @ inputs
            towards[place] += inputs.T @ sets[:, place]
    linear = np.linalg.solve(together + _RIDGE * np.eye(width), towards).astype(np.float32)
    keyed = np.zeros((0, 0, 0), np.float32)
    if max(model.top_k) == 1 and layers * experts**3 <= _MOST_KEYED:
        keyed = np.zeros((layers, experts * experts, experts), np.float32)
        for place in range(2, layers):
            keys = routes[:, place - 2, 0].astype(np.int64) * experts + routes[:, place - 1, 0]
            np.add.at(keyed[place], (keys, routes[:, place, 0]), 1.0)
    return LayerTable(frequency=windows.frequency(), linear=linear, keyed=keyed)


def _multi_hot(routes: NDArray[np.int16], experts: int) -> Array:
    sets = np.zeros((*routes.shape[:2], experts + 1), np.float32)
    np.put_along_axis(sets, np.where(routes >= 0, routes, experts).astype(np.int64), 1.0, axis=2)
    return sets[..., :-1]


def _inputs(sets: Array, place: int) -> Array:
    """Sets of the layer before, of the one before that, and a constant, shape ``(tokens, 2 * experts + 1)``."""
    nothing = np.zeros_like(sets[:, 0])
    before = sets[:, place - 1] if place >= 1 else nothing
    earlier = sets[:, place - 2] if place >= 2 else nothing
    return np.concatenate([before, earlier, np.ones((len(sets), 1), np.float32)], 1)


class TableScorer:
    """Looks up the experts of the two previous layers.

    Parameters
    ----------
    model : RoutedModel
        For which it was counted.
    table : LayerTable
        The counts.
    """

    def __init__(self, model: RoutedModel, table: LayerTable) -> None:
        self._table = table
        self._experts = model.shape[1]
        self._exists = model.exists
        self._start = frequency_forecast(table.frequency)

    def remember(self) -> None:
        return None

    def forecast(self, memory: None, history: History) -> Forecast:
        return self._start

    def refine(
        self, memory: None, history: History, forecast: Forecast, observed: int, scores: Scores | None
    ) -> Chances:
        chances = self._start.now.copy()
        if not observed:
            return chances
        routes = history.routes[-1]
        linear, experts = self._table.linear, self._experts
        before = self._known(routes, observed - 1)
        earlier = self._known(routes, observed - 2)
        for place in range(observed, min(observed + _AHEAD, len(chances))):
            weights = linear[place]
            # Of what was observed there are a few rows to add up; a guess has a weight for each.
            row = weights[-1] + (weights[before].sum(0) if before.dtype == np.int64 else before @ weights[:experts])
            if earlier.dtype == np.int64:
                row += weights[experts + earlier].sum(0)
            else:
                row += earlier @ weights[experts : 2 * experts]
            np.clip(row, 1e-4, 0.999, out=row)
            if place == observed and place >= 2 and self._table.keyed.size and before.size and earlier.size:
                counts = self._table.keyed[place, int(earlier[0]) * experts + int(before[0])]
                row = (counts + _KEY_TRUST * row) / (counts.sum() + _KEY_TRUST)
            chances[place] = row * self._exists[place]
            before, earlier = chances[place], before
        return chances

    def _known(self, routes: NDArray[np.int16], place: int) -> NDArray[np.int64]:
        if place < 0:
            return np.empty(0, np.int64)
        chosen: NDArray[np.int64] = routes[place][routes[place] >= 0].astype(np.int64)
        return chosen


# ---- the token


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """How often each token used each expert, sparse.

    Attributes
    ----------
    frequency : ndarray of float32, shape (layers, experts)
        Share of all tokens that use each expert.
    seen : ndarray of int32, shape (vocabulary,)
        How often each token was read.
    starts : ndarray of int64, shape (vocabulary + 1,)
        Where each token's entries begin.
    cells : ndarray of int32, shape (entries,)
        Expert numbers, layer position times the most experts of a layer plus the index.
    counts : ndarray of int32, shape (entries,)
        How often the token used them.
    """

    frequency: Array
    seen: NDArray[np.int32]
    starts: NDArray[np.int64]
    cells: NDArray[np.int32]
    counts: NDArray[np.int32]

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return what is saved."""
        return {name: getattr(self, name) for name in ("frequency", "seen", "starts", "cells", "counts")}


def count_tokens(windows: Windows, vocabulary: int, *, later: int = 0) -> TokenCounts:
    """Count which experts each token uses.

    Parameters
    ----------
    windows : Windows
        Tokens and routes.
    vocabulary : int
        Token ids.
    later : int
        Count what is used so many tokens later instead.
    """
    layers, experts = windows.model.shape
    total = layers * experts
    tokens = windows.tokens[:, : windows.width - later].ravel()
    routes = windows.routes[:, later:].reshape(len(tokens), layers, -1)
    whole = (routes[..., 0] >= 0).all(1)
    tokens, routes = tokens[whole], routes[whole]
    keys = tokens[:, None, None] * total + (np.arange(layers) * experts)[:, None] + routes
    unique, counts = np.unique(keys[routes >= 0], return_counts=True)
    starts = np.searchsorted(unique, np.arange(vocabulary + 1, dtype=np.int64) * total)
    return TokenCounts(
        frequency=windows.frequency(),
        seen=np.bincount(tokens, minlength=vocabulary)[:vocabulary].astype(np.int32),
        starts=starts.astype(np.int64),
        cells=(unique % total).astype(np.int32),
        counts=counts.astype(np.int32),
    )


class TokenScorer:
    """Looks up the token: a control, and what there is for a predictor that may cost nothing.

    Parameters
    ----------
    model : RoutedModel
        For which it was counted.
    table : TokenCounts
        The counts.
    """

    def __init__(self, model: RoutedModel, table: TokenCounts) -> None:
        self._table = table
        self._start = frequency_forecast(table.frequency)
        self._prior = _TOKEN_TRUST * table.frequency.ravel()

    def remember(self) -> None:
        return None

    def forecast(self, memory: None, history: History) -> Forecast:
        table, token = self._table, int(history.tokens[-1])
        if not 0 <= token < len(table.seen) or not table.seen[token]:
            return self._start
        entries = slice(int(table.starts[token]), int(table.starts[token + 1]))
        now = self._prior.copy()
        now[table.cells[entries]] += table.counts[entries]
        now /= table.seen[token] + _TOKEN_TRUST
        return Forecast(now=now.reshape(self._start.now.shape), soon=self._start.soon)

    def refine(
        self, memory: None, history: History, forecast: Forecast, observed: int, scores: Scores | None
    ) -> Chances:
        return forecast.now
