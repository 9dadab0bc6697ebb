"""Swaps in the background: the resident set follows what routers wish, and no step waits for it (SwapMoE)."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import FloatArray, IntArray
from expertier.virtual.importance import Importance


class Swaps(Protocol):
    """What executes the swaps: the offload manager."""

    @property
    def swapping(self) -> bool:
        """Whether a load in the background is under way."""

    def swap(self, most: int, *, worth: FloatArray | None = None, margin: float = 1.0) -> int:
        """Begin to replace the resident experts worth least by the absent ones worth most."""


class Swapper:
    """Begins swaps between steps, a few at a time; reads in the background leave storage half of the time to others.

    Parameters
    ----------
    manager : Swaps
        Executes them.
    importance : Importance
        Decides what enters and leaves.
    most : int
        Most swaps begun at a time; the next begin when all of them have ended.
    margin : float
        How many times more important than its victim an expert must be: without it two equals would take turns.
    """

    def __init__(
        self,
        manager: Swaps,
        importance: Importance,
        *,
        most: int = 1,
        margin: float = 1.25,
    ) -> None:
        self._manager = manager
        self._importance = importance
        self._most = most
        self._margin = margin
        self._prompt = False

    def note(
        self,
        layer: int,
        routes: IntArray,
        weights: NDArray[np.floating[Any]],
        inputs: NDArray[np.floating[Any]] | None,
    ) -> None:
        """Note what a router wishes for; see :meth:`Importance.note`."""
        self._importance.note(layer, routes, weights, inputs, prompt=self._prompt)

    def begin_step(self, tokens: int, phase: Literal["decode", "prefill"]) -> None:
        """A step over so many tokens begins: of one sequence (prefill) or of one sequence each (decode)."""
        self._prompt = phase == "prefill"
        self._importance.advance(tokens if self._prompt else 1)

    def after_step(self) -> None:
        """A step has ended: begin what may begin."""
        if not self._manager.swapping:
            self._manager.swap(self._most, worth=self._importance.worth(), margin=self._margin)
