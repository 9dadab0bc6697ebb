"""What a worker tells the scheduler of a step: routes of its tokens, loads, and what is resident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.manager import OffloadManager
from expertier.scheduling import resident_experts

MOST_ROWS = 256
"""Tokens of a step whose routes are told; of longer steps, tokens at equal distances."""

_RESIDENT_EVERY = 8


@dataclass(frozen=True, slots=True)
class StepRoutes:
    """One step, as it crosses processes.

    Attributes
    ----------
    experts : int
        Experts of the widest layer.
    rows : ndarray of int32, shape (rows,)
        Tokens of the step that are told about.
    routes : ndarray of int16, shape (rows, layers, top_k)
        Experts; -1 where a layer did not tell.
    loads : int
        Experts that were absent when needed.
    resident : ndarray of uint8 or None
        Bits of the experts in memory, layer after layer, now and then.
    """

    experts: int
    rows: NDArray[np.int32]
    routes: NDArray[np.int16]
    loads: int
    resident: NDArray[np.uint8] | None


class RouteLog:
    """Collects the routes of a step layer by layer, into memory that is allocated once.

    Parameters
    ----------
    manager : OffloadManager
        Whose residency and loads are told.
    experts : sequence of int
        Experts of each layer, in order; its index is the position that :meth:`note` is given.
    layers : sequence of int
        Their indices.
    top_k : int
        Largest top-k.
    """

    def __init__(self, manager: OffloadManager, layers: Sequence[int], experts: Sequence[int], top_k: int) -> None:
        self._manager = manager
        self._layers = list(layers)
        self._experts = max(experts)
        self._table = np.full((MOST_ROWS, len(self._layers), top_k), -1, np.int16)
        self._every = 1
        self._steps = self._misses = 0
        self._rows = 0

    def note(self, position: int, routes: NDArray[Any]) -> None:
        """Note what a layer's router chose, shape ``(tokens, top_k)``."""
        if position == 0:
            self._every = -(-len(routes) // MOST_ROWS)
            self._rows = -(-len(routes) // self._every)
            self._table[: self._rows] = -1
        picked = routes[:: self._every]
        if len(picked) == self._rows:
            self._table[: self._rows, position, : routes.shape[1]] = picked

    def take(self, tokens: int) -> StepRoutes | None:
        """Return the step that has just ended, of so many tokens; ``None`` if no layer told."""
        rows, self._rows = self._rows, 0
        if not rows:
            return None
        places = np.arange(0, tokens, self._every, dtype=np.int32)[:rows]  # what is beyond is padding
        misses = self._manager.misses
        loads, self._misses = misses - self._misses, misses
        resident = None
        if self._steps % _RESIDENT_EVERY == 0:
            held = resident_experts(self._manager, self._layers, self._experts)
            resident = np.packbits(held > 0)
        self._steps += 1
        return StepRoutes(
            experts=self._experts,
            rows=places,
            routes=self._table[: len(places)].copy(),
            loads=loads,
            resident=resident,
        )
