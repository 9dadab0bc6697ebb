"""What a batcher is: it decides which of the waiting requests would run together best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import IntArray


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a batcher sees.

    Attributes
    ----------
    waiting : sequence of ndarray of float32, shape (layers * experts,)
        Paths of the waiting requests, in order of arrival; `usual` where nothing is known. One that has not changed
        since the decision before is the same object, so that a batcher may keep what it worked out.
    running : ndarray of float32, shape (running, layers * experts)
        Paths of the requests in the batch.
    usual : ndarray of float32, shape (layers * experts,)
        What tokens use on average.
    resident : ndarray of float32, shape (layers * experts,), or None
        1 for experts in memory, 0 for others; ``None`` when the engine does not tell.
    room : int
        Requests that may join, at least one.
    """

    waiting: Sequence[NDArray[np.float32]]
    running: NDArray[np.float32]
    usual: NDArray[np.float32]
    resident: NDArray[np.float32] | None
    room: int


class Batcher(Protocol):
    """Chooses who joins. Fairness is not its business: :class:`expertier.scheduling.Admission` bounds what it does.

    It may have a ``least_gain`` of its own in place of :data:`expertier.scheduling.worth.LEAST_GAIN`.
    """

    name: str

    def choose(self, now: Round) -> IntArray:
        """Name the rows of `now.waiting` that should join, the first to join first.

        Returns
        -------
        ndarray of int64, shape (at most room,)
            Fewer than there is room for are filled up in order of arrival: a place is never left empty.
        """
