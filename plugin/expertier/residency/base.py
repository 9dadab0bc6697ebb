"""What an eviction policy is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ExpertSpace:
    """All experts of a model, numbered 0..N-1 layer after layer.

    Attributes
    ----------
    layer_of : ndarray of int64, shape (N,)
        Position (0..L-1) among the MoE layers of every expert.
    layers : int
        Number of MoE layers L.
    """

    layer_of: IntArray
    layers: int

    def __len__(self) -> int:
        return len(self.layer_of)


class EvictionPolicy(Protocol):
    """Ranks resident experts by how much they deserve to stay.

    All methods run under the manager's lock and are vectorised over experts.
    """

    name: str

    def touch(self, experts: IntArray, ages: FloatArray | None = None) -> None:
        """Note uses.

        Parameters
        ----------
        experts : ndarray of int64, shape (n,)
            Expert numbers, repeated once per token that uses them.
        ages : ndarray of float64, shape (n,), optional
            Tokens between the use and the end of the step (0 for the newest token). ``None`` stands for one token's
            experts: all of age 0 and none twice.
        """

    def advance(self, tokens: int) -> None:
        """Let time pass by `tokens` tokens (called once per step, before its first layer)."""

    def keep_scores(self, experts: IntArray, layer: int) -> FloatArray:
        """Score of each candidate when layer position `layer` asks for room; the lowest is evicted first."""

    def use_probability(self, experts: IntArray) -> FloatArray:
        """Estimated chance that the next token uses each expert, between 0 and 1."""

    def warm(self, chances: FloatArray) -> None:
        """Begin with what an earlier run found: each expert's chance to be used by a token, shape ``(N,)``."""


@runtime_checkable
class ForecastListener(Protocol):
    """A policy that also looks ahead; others do without."""

    def expect(self, now: FloatArray, soon: FloatArray) -> bool:
        """Take in a forecast, before the step it is about or at its beginning.

        Parameters
        ----------
        now : ndarray of float64, shape (N,)
            Chance that the step uses each expert.
        soon : ndarray of float64, shape (horizons, N)
            Chance of at least one use within the tokens of :data:`expertier.routing.predictor.HORIZONS` after it.

        Returns
        -------
        bool
            Whether it is listened to; one that proved worse than the past is only judged.
        """
