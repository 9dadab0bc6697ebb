"""Loads for all later layers of a step at once, from the chances that their experts are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.routing.gate import Confidence
from expertier.routing.predictor import Chances
from expertier.routing.prefetch_plan import plan_loads


class Prefetcher(Protocol):
    """What executes the loads: the offload manager."""

    def outlook(self) -> tuple[NDArray[np.bool_], int]:
        """Which experts are absent, shape ``(layers, experts)``, and how many loads ahead of need are under way."""

    def prefetch(
        self,
        layer: int,
        experts: NDArray[np.int64],
        probabilities: NDArray[np.float64] | None = None,
        *,
        limit: int,
    ) -> int:
        """Load likely experts, likeliest first, with at most `limit` loads under way; return how many began."""


class PathLoads:
    """Keeps some loads for the rest of a step under way.

    Parameters
    ----------
    manager : Prefetcher
        The offload manager.
    layers : sequence of int
        Indices of the layers with routed experts, ascending.
    confidence : Confidence
        How far chances are to be believed; told of all loads.
    ahead : int
        Most loads under way for each token of a step.

    Notes
    -----
    Few loads are queued at a time: demand overtakes them anyway, but what a later router contradicts should not have
    been begun.
    """

    def __init__(self, manager: Prefetcher, layers: Sequence[int], *, confidence: Confidence, ahead: int) -> None:
        self._confidence = confidence
        self._manager = manager
        self._layers = tuple(layers)
        self._ahead = ahead

    def top_up(self, predict: Callable[[], Chances | None], first: int, tokens: int) -> int:
        """Begin what is likely and absent, as far as there is room for more under way.

        Parameters
        ----------
        predict : callable
            Gives the chance that this step uses each expert, shape ``(layers, experts)``, or ``None`` when it is not
            known; asked only when another load may begin.
        first : int
            Position of the first layer still to come.
        tokens : int
            Tokens of the step.

        Returns
        -------
        int
            Loads begun.
        """
        absent, under_way = self._manager.outlook()
        most = self._ahead * tokens
        if under_way >= most or not absent[first:].any() or (chances := predict()) is None:
            return 0
        believed = chances[first:] * self._confidence.factor(first)
        rows, experts = plan_loads(believed, absent[first:], most=most - under_way)
        begun = 0
        cuts = np.flatnonzero(np.diff(rows)) + 1
        for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
            if start == stop:
                break
            row, chosen = int(rows[start]), experts[start:stop]
            begun += self._manager.prefetch(self._layers[first + row], chosen, believed[row, chosen], limit=most)
            self._confidence.begun(first + row, chosen, chances[first + row, chosen])
        return begun
