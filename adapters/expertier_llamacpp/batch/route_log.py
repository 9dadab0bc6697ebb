"""The routes of a step by token and layer, as a scheduler that looks at routing paths wants them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class RouteLog:
    """Collects what the routers choose while a batch is computed.

    Parameters
    ----------
    layers : sequence of int
        The MoE layers, in order.
    top_k : int
        Most experts of a token in a layer.

    Attributes
    ----------
    routes : ndarray of int64, shape (rows, layers, top_k)
        Of the last batch; -1 where a layer did not compute a row.
    seen : bool
        Whether any were: nobody stops at the routers while all experts are resident.
    """

    def __init__(self, layers: Sequence[int], top_k: int) -> None:
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._top_k = top_k
        self._wanted: NDArray[np.int64] = np.zeros(0, np.int64)
        self.routes: NDArray[np.int64] = np.zeros((0, len(layers), top_k), np.int64)
        self.seen = False

    def begin(self, wanted: NDArray[np.int64], rows: int) -> None:
        """A batch of so many rows is computed, and of those in `wanted` the logits."""
        self._wanted = wanted
        self.routes = np.full((rows, len(self._place), self._top_k), -1, np.int64)
        self.seen = False

    def note(self, layer: int, routes: NDArray[np.int64], start: int, stop: int) -> None:
        """A layer's router has chosen for the rows from `start` to `stop`, or for those of them with logits."""
        rows = np.arange(start, stop)
        if len(routes) != len(rows):  # llama.cpp drops the others before the last layer's experts
            rows = self._wanted[(self._wanted >= start) & (self._wanted < stop)]
        if len(routes) == len(rows) and stop <= len(self.routes):
            self.routes[rows, self._place[layer], : routes.shape[1]] = routes
            self.seen = True
