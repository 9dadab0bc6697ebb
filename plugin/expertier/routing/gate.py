"""A feature that loses turns itself off: prefetching is kept only while what it loads is used."""

from __future__ import annotations

from typing import Literal


class GainGate:
    """Decides whether to prefetch, from what prefetching brought lately.

    Parameters
    ----------
    mode : {"auto", "on", "off"}
        ``auto`` measures; the others are constant.
    least_used : float
        Share of prefetched experts that must be used. Below it the bytes wasted cost more than the waits saved,
        because a prefetch occupies the device and a slot.
    window : int
        Prefetches after which a verdict is reached.
    pause : int
        Steps without prefetching after a bad verdict, before the next trial; doubles with every bad verdict in a row.
    """

    def __init__(
        self, mode: Literal["auto", "on", "off"] = "auto", *, least_used: float = 0.6, window: int = 32, pause: int = 64
    ) -> None:
        self.mode = mode
        self._least_used = least_used
        self._window = window
        self._first_pause = self._pause = pause
        self._wait = 0
        self._issued = self._used = 0

    @property
    def open(self) -> bool:
        """Whether to prefetch now."""
        return self.mode == "on" or (self.mode == "auto" and self._wait == 0)

    def step(self, issued: int, used: int) -> None:
        """Account for one step.

        Parameters
        ----------
        issued, used : int
            Prefetches begun and prefetched experts used since the last call.
        """
        if self._wait:
            self._wait -= 1
            return
        self._issued += issued
        self._used += used
        if self._issued >= self._window:
            if self._used < self._least_used * self._issued:
                self._wait = self._pause
                self._pause = min(2 * self._pause, 64 * self._first_pause)
            else:
                self._pause = self._first_pause
            self._issued = self._used = 0
