"""From what is seen while serving, the gate mass that stand-ins took, to what it costs."""

from __future__ import annotations

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
    spread : float
        Of a text's divergence about what the proxy says: standard deviation of its logarithm.
    rows : int
        Texts times settings it was fitted on.
    """

    weights: tuple[float, ...]
    scale: float
    power: float
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
    return Proxy(weights=tuple(weights.tolist()), scale=scale, power=power, spread=spread, rows=len(texts))


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
