"""A feature that loses turns itself off: regrouping stays while steps with it load less than without."""

from __future__ import annotations

from typing import Literal

LEAST_GAIN = 0.01
"""Part of the expected new experts below which a choice is not worth changing the order of arrival for."""

_NOISE = 0.02


class Worth:
    """Decides by trial whether requests are regrouped.

    Regrouping is on at first. After every `hold` decode steps a trial alternates blocks with and without it; the first
    half of each block does not count, because the requests of the block before still run. It is off until the next
    trial if loads per token were not fewer with it.

    Parameters
    ----------
    mode : {"auto", "on", "off"}
        ``auto`` measures; the others are constant.
    block, rounds, hold : int
        Decode steps of a block, blocks of each kind in a trial, decode steps between trials.
    """

    def __init__(
        self, mode: Literal["auto", "on", "off"] = "auto", *, block: int = 512, rounds: int = 2, hold: int = 16384
    ) -> None:
        self.mode = mode
        self._block = block
        self._rounds = rounds
        self._hold = hold
        self._left = hold
        self._winner = True
        self._done = 0  # steps of the trial
        self._sums = ([0.0, 0.0], [0.0, 0.0])  # tokens and loads, without and with regrouping

    @property
    def on(self) -> bool:
        """Whether to regroup now."""
        if self.mode != "auto":
            return self.mode == "on"
        if self._left:
            return self._winner
        return self._done // self._block % 2 == 1

    def step(self, tokens: int, loads: int) -> None:
        """Account for a decode step."""
        if self.mode != "auto":
            return
        if self._left:
            self._left -= 1
            return
        if self._done % self._block >= self._block // 2:
            sums = self._sums[self.on]
            sums[0] += tokens
            sums[1] += loads
        self._done += 1
        if self._done == 2 * self._rounds * self._block:
            (tokens_without, loads_without), (tokens_with, loads_with) = self._sums
            without, within = loads_without / max(tokens_without, 1), loads_with / max(tokens_with, 1)
            self._winner = within < without * (1 + _NOISE)
            self._left, self._done = self._hold, 0
            self._sums = ([0.0, 0.0], [0.0, 0.0])
