"""How much every expert matters now, by what routers wish for and whether or not it is run (SwapMoE, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import FloatArray, IntArray

_HALF_LIFE = 16.0  # tokens, as of the eviction policy


class Importance:
    """Sum over tokens of the input's norm times the gate weight, decayed.

    The norm of the expert's weights, SwapMoE's third factor, is left out: it would mean reading the model at start, and
    measured in ``examples/benchmarks/virtual`` it gained two points of the fourteen that this mode costs, or nothing.

    Parameters
    ----------
    experts : mapping of int to int
        Layer to number of experts.
    half_life : float
        Tokens after which a wish counts half.
    """

    def __init__(self, experts: Mapping[int, int], *, half_life: float = _HALF_LIFE) -> None:
        layers = sorted(experts)
        first = np.cumsum([0, *(experts[layer] for layer in layers)])
        self._first = dict(zip(layers, first.tolist(), strict=False))
        self._decay = 2.0 ** (-1.0 / half_life)
        self._sum = np.zeros(int(first[-1]))

    def advance(self, tokens: int) -> None:
        """Let time pass."""
        self._sum *= self._decay**tokens

    def note(
        self,
        layer: int,
        routes: IntArray,
        weights: NDArray[np.floating[Any]],
        inputs: NDArray[np.floating[Any]] | None,
        *,
        prompt: bool = False,
    ) -> None:
        """Note what the router of a layer wishes for.

        Parameters
        ----------
        layer : int
            The layer.
        routes : ndarray of int64, shape (tokens, top_k)
            Its choice, of the full gate.
        weights : ndarray of float, shape (tokens, top_k)
            Gate weights of it; a token's are made to add up to 1.
        inputs : ndarray of float, shape (tokens, hidden), or None
            What it chose for; ``None`` where that cannot be had counts all tokens alike.
        prompt : bool
            Whether the tokens follow one another, oldest first.
        """
        shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        if inputs is not None:
            shares = shares * np.sqrt(np.einsum("ij,ij->i", inputs, inputs))[:, None]
        if prompt:
            shares = shares * self._decay ** np.arange(len(shares) - 1, -1, -1)[:, None]
        np.add.at(self._sum, self._first[layer] + routes, shares)

    def worth(self) -> FloatArray:
        """Importance of every expert, layer after layer, shape ``(N,)``."""
        return self._sum
