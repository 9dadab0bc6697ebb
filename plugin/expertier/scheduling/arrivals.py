"""When requests are asked: at random or recorded moments, or whenever a client has been answered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def poisson_seconds(count: int, rate: float, seed: int) -> NDArray[np.float64]:
    """Draw moments of arrivals that are independent of each other, `rate` a second on average."""
    result: NDArray[np.float64] = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))
    return result


class Arrivals:
    """Numbers 0..count-1 in the order in which they are asked.

    Parameters
    ----------
    count : int
        Requests.
    seconds : sequence of float, optional
        When each of them arrives, ascending, whatever has been answered by then (open loop).
    clients : int
        Without `seconds`: how many are there at a time; the next one comes when one was answered (closed loop).
    """

    def __init__(self, count: int, *, seconds: Sequence[float] | NDArray[np.float64] | None = None, clients: int = 0):
        self._seconds = None if seconds is None else np.asarray(seconds, np.float64)
        self._clients = clients
        self._count = count
        self._next = 0

    @property
    def over(self) -> bool:
        """Whether all have arrived."""
        return self._next == self._count

    @property
    def next_at(self) -> float:
        """When the next one arrives, in an open loop."""
        assert self._seconds is not None
        return float(self._seconds[self._next])

    def due(self, now: float, there: int) -> list[tuple[int, float]]:
        """Tell who arrives by now, and since when.

        Parameters
        ----------
        now : float
            Seconds.
        there : int
            Requests that have arrived and were not answered to the end.
        """
        begin = self._next
        if self._seconds is None:
            self._next = min(self._count, max(begin, begin + self._clients - there))
            return [(number, now) for number in range(begin, self._next)]
        self._next = max(begin, int(np.searchsorted(self._seconds, now, side="right")))
        return [(number, float(self._seconds[number])) for number in range(begin, self._next)]
