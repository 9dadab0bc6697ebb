"""Loads for all later layers of a step at once, from the chances that their experts are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.routing.gate import WIDEST, Confidence
from expertier.routing.predictor import Chances
from expertier.routing.prefetch_plan import DOUBTFUL_CHANCE, LEAST_CHANCE, plan_loads

_BUSY_WITH = 3  # loads ahead of need that keep the device busy until the next router has chosen
_IDLE_FROM = 0.25  # share of layers that found the device idle from which doubtful loads are begun, too
_PACE = 0.02  # weight of one layer in that share


class Prefetcher(Protocol):
    """What executes the loads: the offload manager."""

    @property
    def idle(self) -> bool:
        """Whether nothing is being loaded."""

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
        Most loads under way, however many tokens a step has.
    least, least_doubtful : float
        Chance from which an expert is loaded, and the same where the device idles often.

    Notes
    -----
    Few loads are queued at a time. The device has to be busy until the next router has chosen; what is queued beyond
    that has evicted its victim too early, and a later router may contradict it. With 64 instead of 4 queued, a batch
    of eight read a third more. Where the device has bandwidth to spare, it is also given what is less likely.
    """

    def __init__(
        self,
        manager: Prefetcher,
        layers: Sequence[int],
        *,
        confidence: Confidence,
        ahead: int,
        least: float = LEAST_CHANCE,
        least_doubtful: float = DOUBTFUL_CHANCE,
    ) -> None:
        self._confidence = confidence
        self._manager = manager
        self._layers = tuple(layers)
        self._ahead = ahead
        self._least, self._doubtful = least, least_doubtful
        self._idle = 0.0  # how often nothing at all was being loaded, lately

    def top_up(self, predict: Callable[[], Chances | None], first: int) -> int:
        """Begin what is likely and absent, as far as there is room for more under way.

        Parameters
        ----------
        predict : callable
            Gives the chance that this step uses each expert, shape ``(layers, experts)``, or ``None`` when it is not
            known; asked only when another load may begin.
        first : int
            Position of the first layer still to come.

        Returns
        -------
        int
            Loads begun.
        """
        self._idle += _PACE * (self._manager.idle - self._idle)
        absent, under_way = self._manager.outlook()
        absent = absent[first:]
        if under_way >= self._ahead or not absent.any() or (chances := predict()) is None:
            return 0
        absent = absent & (chances[first:] >= min(self._least, self._doubtful) / WIDEST)
        if not absent.any():
            return 0
        believed = chances[first:] * self._confidence.factor(first)
        doubtful = _BUSY_WITH - under_way if self._idle >= _IDLE_FROM else 0
        rows, experts = plan_loads(
            believed,
            absent,
            most=self._ahead - under_way,
            least=self._least,
            doubtful=doubtful,
            least_doubtful=self._doubtful,
        )
        begun = 0
        cuts = np.flatnonzero(np.diff(rows)) + 1
        for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
            if start == stop:
                break
            row, chosen = int(rows[start]), experts[start:stop]
            begun += self._manager.prefetch(self._layers[first + row], chosen, believed[row, chosen], limit=self._ahead)
            self._confidence.begun(first + row, chosen, chances[first + row, chosen])
        return begun
