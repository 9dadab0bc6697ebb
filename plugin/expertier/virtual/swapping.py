"""Swaps in the background: the resident set follows what routers wish, and no step waits for it (SwapMoE)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Swaps(Protocol):
    """What executes the swaps: the offload manager."""

    @property
    def swapping(self) -> bool:
        """Whether a load in the background is under way."""

    def swap(self, most: int, *, margin: float = 1.0) -> int:
        """Begin to replace the resident experts least likely to be used by the likeliest absent ones."""


class Swapper:
    """Begins swaps between steps, a few at a time and within a share of the storage's time.

    What enters and leaves is the eviction policy's estimate, which is fed with what the routers wished for, also where
    another expert stood in.

    Parameters
    ----------
    manager : Swaps
        Executes them.
    most : int
        Most swaps begun at a time; the next begin when all of them have ended.
    share : float
        Share of time that storage may be busy with swaps.
    margin : float
        How many times likelier than its victim an expert must be: without it two equals would take turns.
    clock : callable
        Gives seconds.
    """

    def __init__(
        self,
        manager: Swaps,
        *,
        most: int = 1,
        share: float = 0.5,
        margin: float = 1.25,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._manager = manager
        self._most = most
        self._share = share
        self._margin = margin
        self._clock = clock
        self._began: float | None = None
        self._not_before = 0.0

    def after_step(self) -> None:
        """A step has ended: begin what may begin."""
        if self._manager.swapping:
            return
        now = self._clock()
        if self._began is not None:  # at the latest now the swap has ended
            self._not_before = self._began + (now - self._began) / self._share
            self._began = None
        if now >= self._not_before and self._manager.swap(self._most, margin=self._margin):
            self._began = now
