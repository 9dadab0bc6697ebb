"""A calibrated mixture of predictors by layer and horizon.

Each predictor gives chances; their log-odds are added up with weights that were fitted by logistic regression on text
that none of them was trained on. So a chance of .7 means that seven of ten such experts are used, and loads can be
chosen by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from expertier.routing.history import History, Scorer
from expertier.routing.path import sigmoid
from expertier.routing.predictor import Chances, Forecast, RoutedModel, Scores
from expertier.routing.table import frequency_forecast

Array = NDArray[np.float32]

PARTS: Final[tuple[str, ...]] = ("path", "tokens", "table")
INPUTS: Final = (*PARTS, "frequency", "lookahead", "constant")
"""What the weights belong to; a part that was not trained has the weight 0."""
DISTANCES: Final = 5
"""Layers between the last one whose routes are known and the predicted one: 1 to 4; 0 before the step's first layer."""

_LEAST = 1e-4  # chances are kept from 0 and 1 by this much
_NOTHING_NEW = 0.1  # weight of the table beside the path's, of about 1, up to which it only repeats the path


def logit(chances: Array) -> Array:
    """Return log-odds, of chances that are neither 0 nor 1."""
    clipped = np.minimum(np.maximum(chances, _LEAST), 1.0 - _LEAST)
    odds: Array = np.log(clipped / (1.0 - clipped))
    return odds


def lookahead_input(scores: Array) -> Array:
    """Return log-softmax of a router's scores, shape ``(..., experts)``."""
    top = scores.max(-1, keepdims=True)
    shifted = scores - top
    found: Array = np.maximum(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), -20.0)
    return found


@dataclass(frozen=True, kw_only=True)
class BlendWeights:
    """Weights of the mixture.

    Attributes
    ----------
    now : ndarray of float32, shape (2, DISTANCES, layers, len(INPUTS))
        Without and with the lookahead, by distance.
    soon : ndarray of float32, shape (len(HORIZONS), layers, 3)
        Of the path's chance, the frequency's and a constant.
    """

    now: Array
    soon: Array

    def arrays(self) -> dict[str, Array]:
        """Return what is saved."""
        return {"now": self.now, "soon": self.soon}


@dataclass
class _Memory:
    parts: dict[str, Any]
    forecasts: dict[str, Forecast] = field(default_factory=dict)
    odds: dict[str, Array] = field(default_factory=dict)  # of the forecasts, by part


class BlendScorer:
    """Mixes predictors.

    Parameters
    ----------
    model : RoutedModel
        For which they were trained.
    parts : mapping of str to Scorer
        Those of :data:`PARTS` that were trained.
    frequency : ndarray of float32, shape (layers, experts)
        Share of tokens that use each expert.
    weights : BlendWeights
        Fitted weights.
    """

    def __init__(
        self, model: RoutedModel, parts: Mapping[str, Scorer], frequency: Array, weights: BlendWeights
    ) -> None:
        self._parts = dict(parts)
        self._exists = model.exists
        self._layers = model.layers
        self._experts = model.experts
        self._frequency = logit(frequency)
        self._weights = weights
        self.listens = bool(weights.now[1, :, :, INPUTS.index("lookahead")].any())  # fitted with the routers' inputs
        # Without either a token's routes tell nothing about its later layers, and to say so after every layer takes
        # longer than the forecast: the weights for what is known before the first layer are right all the way.
        table = float(np.abs(weights.now[0, 1:, :, INPUTS.index("table")]).max())
        self.refines = self.listens or "path" not in parts or table > _NOTHING_NEW
        self._steady = logit(frequency_forecast(frequency).soon)

    def remember(self) -> _Memory:
        return _Memory(parts={name: part.remember() for name, part in self._parts.items()})

    def forecast(self, memory: _Memory, history: History) -> Forecast:
        weights = self._weights
        odds = self._frequency * weights.now[0, 0, :, 3, None]
        odds += weights.now[0, 0, :, 5, None]
        for name, part in self._parts.items():
            if name == "table" and not self.refines:
                continue
            memory.forecasts[name] = found = part.forecast(memory.parts[name], history)
            if name != "table":  # it knows nothing of this token yet
                memory.odds[name] = logit(found.now)
                odds += memory.odds[name] * weights.now[0, 0, :, PARTS.index(name), None]
        soon = self._steady * weights.soon[:, :, 1, None]
        soon += weights.soon[:, :, 2, None]
        if "path" in memory.forecasts:
            soon += logit(memory.forecasts["path"].soon) * weights.soon[:, :, 0, None]
        return Forecast(now=self._chances(odds, self._exists), soon=self._chances(soon, self._exists))

    def refine(
        self, memory: _Memory, history: History, forecast: Forecast, observed: int, scores: Scores | None
    ) -> Chances:
        if not self.refines:
            return forecast.now
        chances = forecast.now.copy()
        if not observed:
            return chances
        rows = slice(observed, min(observed + DISTANCES - 1, len(chances)))
        places = np.arange(rows.start, rows.stop)
        looked = [scores.get(self._layers[place]) if scores else None for place in places]
        with_scores = np.array([item is not None for item in looked], np.int64)
        weights = self._weights.now[with_scores, places - observed + 1, places]  # (rows, inputs)
        odds = self._frequency[rows] * weights[:, 3, None]
        odds += weights[:, 5, None]
        for name, part in self._parts.items():
            if name == "table":
                row = logit(part.refine(memory.parts[name], history, memory.forecasts[name], observed, None)[rows])
            else:
                row = memory.odds[name][rows]
            odds += row * weights[:, PARTS.index(name), None]
        for index, item in enumerate(looked):
            if item is not None:
                odds[index, : self._experts[places[index]]] += lookahead_input(item) * weights[index, 4]
        chances[rows] = self._chances(odds, self._exists[rows])
        return chances

    @staticmethod
    def _chances(odds: Array, exists: NDArray[np.bool_]) -> Chances:
        return sigmoid(odds) * exists


def fit_logistic(inputs: NDArray[np.float64], used: NDArray[np.bool_], *, ridge: float = 1.0) -> NDArray[np.float64]:
    """Fit weights of a logistic regression by Newton's method.

    Parameters
    ----------
    inputs : ndarray of float64, shape (samples, n)
        The last column is the constant.
    used : ndarray of bool, shape (samples,)
        What came.
    ridge : float
        Penalty on weights, so that inputs that say the same share theirs.
    """
    weights = np.zeros(inputs.shape[1])
    penalty = ridge * np.eye(len(weights))
    penalty[-1, -1] = 1e-6
    for _ in range(25):
        p = 0.5 * (1.0 + np.tanh(0.5 * np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (p - used) + penalty @ weights
        curvature = (inputs * (p * (1.0 - p))[:, None]).T @ inputs + penalty
        change = np.linalg.solve(curvature, gradient)
        weights -= np.clip(change, -2.0, 2.0)
        if np.abs(change).max() < 1e-5:
            break
    return weights
