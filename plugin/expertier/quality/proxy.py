"""From what is seen while serving, the gate mass that stand-ins took, to what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertier.quality.evaluation import Evaluation

_LEAST_ROWS = 8
_RIDGE = 0.1  # how strongly layers are taken to be alike, per row


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """KL divergence as a power of the substituted gate mass.

    Attributes
    ----------
    weights : tuple of float
        What a unit of gate mass counts in each layer; 1 on average.
    scale, power : float
        ``kl = scale * (sum of weights * mass) ** power``, both per token and averaged over some tokens.
    linear, square : float
        What a divergence costs: the cross-entropy rises by ``linear * kl + square * kl**2``. Were the exact model the
        truth about text, it would rise by just the divergence; a small disturbance of a model that errs itself costs
        less.
    spread : float
        Of a text's divergence about what the proxy says: standard deviation of its logarithm.
    rows : int
        Texts times settings it was fitted on.
    """

    weights: tuple[float, ...]
    scale: float
    power: float
    linear: float = 1.0
    square: float = 0.0
    spread: float
    rows: int

    def kl(self, mass: NDArray[np.float64]) -> float:
        """Predicted KL divergence per token.

        Parameters
        ----------
        mass : ndarray of float64, shape (layers,)
            Gate mass per token that stand-ins took, averaged over some tokens.
        """
        return float(self.scale * max(0.0, float(np.dot(self.weights, mass))) ** self.power)

    def increase(self, kl: float) -> float:
        """Relative increase of the perplexity that a divergence is expected to cost."""
        return math.expm1(min(self.linear * kl + self.square * kl * kl, 50.0))

    def allowed_kl(self, increase: float) -> float:
        """Divergence at which the perplexity is expected to rise by so much."""
        nats = math.log1p(increase)
        if not self.square:
            return nats / self.linear
        return (math.sqrt(self.linear**2 + 4 * self.square * nats) - self.linear) / (2 * self.square)


def fit(evaluations: Iterable[Evaluation]) -> Proxy:
    """Fit a proxy to texts measured in several settings.

    Parameters
    ----------
    evaluations : iterable of Evaluation
        The settings; those in which nothing stood in add nothing.

    Notes
    -----
    A power is fitted to the mass summed over layers first, then weights of layers by ridge regression towards being all
    alike, because a few texts cannot tell many layers apart; negative ones count as none. Last, `scale` is set so that
    what is predicted sums up to what was measured.
    """
    texts = [text for found in evaluations for text in found.texts if sum(text.substituted) > 0 and text.kl > 0]
    if not texts:
        return Proxy(weights=(), scale=0.0, power=1.0, spread=0.0, rows=0)
    tokens = np.array([text.tokens for text in texts], float)
    mass = np.array([text.substituted for text in texts]) / tokens[:, None]
    kl = np.array([text.kl for text in texts]) / tokens
    total = np.log(mass.sum(1))
    power = 1.0
    if len(texts) >= _LEAST_ROWS and total.std() > 0.1:
        power = float(np.clip(np.polyfit(total, np.log(kl), 1)[0], 0.5, 3.0))
    weights = _layer_weights(mass, kl ** (1 / power))
    predicted = (mass @ weights) ** power
    scale = float((kl * tokens).sum() / (predicted * tokens).sum())
    spread = float(np.std(np.log(kl) - np.log(scale * np.maximum(predicted, np.finfo(float).tiny))))
    gained = np.array([text.nll - text.exact_nll for text in texts]) / tokens
    linear, square = _cost(kl, gained, tokens)
    return Proxy(
        weights=tuple(weights.tolist()),
        scale=scale,
        power=power,
        linear=linear,
        square=square,
        spread=spread,
        rows=len(texts),
    )


def _cost(kl: NDArray[np.float64], gained: NDArray[np.float64], tokens: NDArray[np.float64]) -> tuple[float, float]:
    """Fit ``gained = linear * kl + square * kl**2``, neither below nothing.

    The log-ratio of two distributions that differ little has a variance of twice their divergence, so that is what a
    text's gain is uncertain by, and its weight follows.
    """
    weights = tokens / kl
    powers = np.stack([kl, kl * kl])
    left, right = (powers * weights) @ powers.T, (powers * weights) @ gained
    alone = np.maximum(right / np.diag(left), 0.0)
    if np.linalg.cond(left) < 1e8:
        both = np.linalg.solve(left, right)
        if (both >= 0).all():
            return float(both[0]), float(both[1])
    errors = [float(alone[i] ** 2 * left[i, i] - 2 * alone[i] * right[i]) for i in range(2)]
    if not alone.any():
        return 1.0, 0.0  # too little text to see any cost: the divergence is the careful assumption
    return (float(alone[0]), 0.0) if errors[0] <= errors[1] else (0.0, float(alone[1]))


def _layer_weights(mass: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    layers = mass.shape[1]
    if len(mass) < max(_LEAST_ROWS, 2 * layers):
        return np.ones(layers)
    size = mass.sum(1)
    # Relative errors count: each row is divided by its mass.
    rows, wanted = mass / size[:, None], target / size
    alike = float(wanted.mean())
    penalty = _RIDGE * len(rows) / layers
    weights = np.linalg.solve(
        rows.T @ rows + penalty * np.eye(layers) / layers, rows.T @ wanted + penalty * alike / layers
    )
    weights = np.maximum(weights, 0.0)
    result: NDArray[np.float64] = weights / weights.mean() if weights.any() else np.ones(layers)
    return result
