"""A feature that loses turns itself off: prefetching stays only while steps with it are quicker than without."""

from __future__ import annotations

from statistics import median
from typing import Literal


class GainGate:
    """Decides by trial whether to prefetch.

    A trial alternates short blocks of steps with and without prefetching and compares their median step times; the
    winner stays for `hold` steps, then a new trial begins, because text and cache contents change.

    Parameters
    ----------
    mode : {"auto", "on", "off"}
        ``auto`` measures; the others are constant.
    block : int
        Steps in one block.
    rounds : int
        Blocks of each kind in a trial.
    hold : int
        Steps between trials.
    """

    def __init__(
        self, mode: Literal["auto", "on", "off"] = "auto", *, block: int = 8, rounds: int = 4, hold: int = 512
    ) -> None:
        self.mode = mode
        self._block = block
        self._rounds = rounds
        self._hold = hold
        self._left = 0  # steps until the next trial
        self._trial: tuple[list[float], list[float]] = ([], [])  # step times without and with prefetching
        self._winner = True

    @property
    def open(self) -> bool:
        """Whether to prefetch now."""
        if self.mode != "auto":
            return self.mode == "on"
        if self._left:
            return self._winner
        done = len(self._trial[0]) + len(self._trial[1])
        return done // self._block % 2 == 0

    def step(self, seconds: float) -> None:
        """Account for one step that took `seconds`."""
        if self.mode != "auto":
            return
        if self._left:
            self._left -= 1
            return
        self._trial[self.open].append(seconds)
        without, within = self._trial
        if len(without) + len(within) == 2 * self._rounds * self._block:
            self._winner = median(within) < median(without)
            self._left = self._hold
            self._trial = ([], [])
