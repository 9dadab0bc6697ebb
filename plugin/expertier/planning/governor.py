"""The governor: gives memory of experts back before the kernel kills the process, and takes it again slowly.

:func:`decide` is a pure function of the last decision and a reading; :class:`PressureGovernor` runs it in a thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from expertier.budget import format_bytes
from expertier.errors import BudgetError, ManagerClosedError
from expertier.planning.pressure import Pressure, read_pressure

logger = logging.getLogger("expertier")

_INTERVAL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class GovernorSettings:
    """When to give back and when to take again.

    Attributes
    ----------
    smallest, largest : int
        Bounds of the budget: one token's experts, and what was asked for.
    reserve : int
        Bytes that are to stay free. With less, the budget shrinks; it grows only while twice as much is free.
    full, some : float
        Shares of time in which all tasks, or some, wait for memory, from which the budget shrinks by `step` even though
        the reserve is there.
    step : float
        Part of `largest` by which pressure shrinks and calm grows at a time.
    calm_seconds : float
        Time without pressure before the budget grows, and between two steps of growth.
    """

    smallest: int
    largest: int
    reserve: int
    full: float = 0.05
    some: float = 0.4
    step: float = 1 / 16
    calm_seconds: float = 5.0

    @classmethod
    def usual(cls, *, smallest: int, largest: int, limit: int, margin: int | None = None) -> GovernorSettings:
        """Keep the larger of 32 MiB and one percent of the limit free.

        Parameters
        ----------
        smallest, largest : int
            Bounds of the budget.
        limit : int
            The tightest memory limit.
        margin : int, optional
            What budget "auto" leaves free. Wanting more than half of it would be pressure without end.
        """
        reserve = max(32 << 20, limit // 100)
        return cls(smallest=smallest, largest=largest, reserve=reserve if margin is None else min(reserve, margin // 2))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided.

    Attributes
    ----------
    budget : int
        The budget to be in force.
    calm_since : float
        Time since which there is no pressure and nothing was changed.
    """

    budget: int
    calm_since: float


def decide(last: Decision, reading: Pressure, *, held: int, now: float, settings: GovernorSettings) -> Decision:
    """Decide the budget.

    Parameters
    ----------
    last : Decision
        The previous one.
    reading : Pressure
        Memory now.
    held : int
        Bytes that experts hold.
    now : float
        Seconds.
    settings : GovernorSettings
        Bounds and thresholds.

    Notes
    -----
    Between the reserve and twice the reserve nothing happens: what one decision frees cannot make the next one take it.
    """
    left = reading.limit.left
    step = max(1, int(settings.step * settings.largest))
    if left < settings.reserve:
        # Below the reserve by so much, and half a reserve more, so that the next reading is not at the edge again.
        target = min(last.budget, held) - (settings.reserve - left) - settings.reserve // 2
    elif _waiting(reading, settings) and left < 4 * settings.reserve:
        target = min(last.budget, held) - step
    elif now - last.calm_since < settings.calm_seconds or last.budget >= settings.largest:
        return last
    else:
        # What the budget allows already and is not held yet will be taken, too.
        room = left - 2 * settings.reserve - max(0, last.budget - held)
        if room <= 0:
            return last
        target = last.budget + min(step, room)
    return Decision(budget=max(settings.smallest, min(target, settings.largest)), calm_since=now)


def _waiting(reading: Pressure, settings: GovernorSettings) -> bool:
    return (reading.full or 0.0) >= settings.full or (reading.some or 0.0) >= settings.some


class PressureGovernor:
    """Runs :func:`decide` while an engine serves.

    Parameters
    ----------
    settings : GovernorSettings
        Bounds and thresholds.
    resize : callable
        Puts a budget into force; may refuse with a ``BudgetError`` while a step needs more, and is then asked again.
    held : callable
        Tells how many bytes experts hold.
    read : callable
        Reads the pressure.
    interval : float
        Seconds between readings.
    """

    def __init__(
        self,
        settings: GovernorSettings,
        *,
        resize: Callable[[int], None],
        held: Callable[[], int],
        read: Callable[[], Pressure] = read_pressure,
        interval: float = _INTERVAL_SECONDS,
    ) -> None:
        self._settings = settings
        self._resize = resize
        self._held = held
        self._read = read
        self._interval = interval
        self._last = Decision(budget=settings.largest, calm_since=0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expertier-governor", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def ask(self, largest: int) -> None:
        """Take another budget as what is asked for: nobody wants the governor to undo it."""
        self._settings = replace(self._settings, largest=largest)
        self._last = Decision(budget=min(self._last.budget, largest), calm_since=self._last.calm_since)

    @property
    def budget(self) -> int:
        """The budget last decided."""
        return self._last.budget

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def look(self, now: float) -> None:
        """Read once and act."""
        reading = self._read()
        found = decide(self._last, reading, held=self._held(), now=now, settings=self._settings)
        if found.budget == self._last.budget:
            return
        try:
            self._resize(found.budget)
        except BudgetError as error:
            logger.debug("The budget stays for now: %s", error)
            return
        logger.warning(
            "%s has %s left: experts get %s instead of %s.",
            reading.limit.source,
            format_bytes(reading.limit.left),
            format_bytes(found.budget),
            format_bytes(self._last.budget),
        )
        self._last = found

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                self.look(time.monotonic())
            except ManagerClosedError:
                return
            except OSError as error:  # a control group that went away under us
                logger.warning("Memory pressure cannot be read any more: %s", error)
                return
