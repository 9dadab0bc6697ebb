"""The bound for what a scheduler can know: each request's kind of text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import IntArray
from expertier.scheduling.paths import PathBook

ORACLE = "domains"
"""Name of the arm that is told domains."""


class KnownDomains(PathBook):
    """Describes a request by its kind of text, which no server is told.

    Parameters
    ----------
    domains : sequence of str
        Kind of each request.
    number : callable
        From the engine's name of a request to its place in `domains`.
    """

    def __init__(self, domains: Sequence[str], number: Callable[[Hashable], int]) -> None:
        names = sorted(set(domains))
        super().__init__(1, len(names))
        self._domain = np.eye(len(names), dtype=np.float32)[[names.index(domain) for domain in domains]]
        self._number = number

    def observe(self, requests: Sequence[Hashable], tokens: IntArray, routes: IntArray) -> None:
        """There is nothing to learn."""

    def of_waiting(self, request: Hashable, tokens: IntArray) -> NDArray[np.float32]:
        """Return one in the column of the request's kind."""
        row: NDArray[np.float32] = self._domain[self._number(request)]
        return row

    def of_running(self, request: Hashable) -> NDArray[np.float32]:
        """Return the same as of one that waits."""
        return self.of_waiting(request, np.zeros(0, np.int64))
