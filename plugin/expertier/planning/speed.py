"""How long a decoded token takes: the engine's compute, and what every load of an expert adds to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertier.errors import RoutingDemandError

SCHEMA = "expertier-engine-speed/1"
_LEAST_STEPS = 24
_ALIKE = 0.5  # loads per token by which two budgets must differ to tell what one costs
_LEAST_IDLE = 12  # steps without a load that tell what such a step takes
_BUSY = 2.0  # steps slower than so many times the usual one of their run: the system did something else


@dataclass(frozen=True, kw_only=True)
class SpeedSample:
    """Decode steps of one token under one budget.

    Attributes
    ----------
    budget_bytes : int
        The budget.
    seconds : tuple of float
        Of every step.
    loads : tuple of int
        Loads of every step if nothing was loaded ahead, by replay of its routes.
    """

    budget_bytes: int
    seconds: tuple[float, ...]
    loads: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """Speeds of one engine with one model on one machine.

    Attributes
    ----------
    engine : str
        Name of the adapter.
    fingerprint : str
        The model.
    threads : int
        Compute threads.
    resident_seconds : float
        A token with every expert resident.
    managed_seconds : float
        A token that happens to need no load, while others may.
    load_seconds : float
        What one load adds to a token: waiting that compute does not hide, and the engine's own time.
    measured : tuple of (float, float)
        Loads and seconds per token under every budget that was measured, ascending; empty where only the line is known.
    options : dict of str to object
        Options of Expertier that were in force; loading ahead is in these figures.
    """

    schema: str = SCHEMA
    engine: str
    fingerprint: str
    threads: int
    resident_seconds: float
    managed_seconds: float
    load_seconds: float
    measured: tuple[tuple[float, float], ...] = ()
    options: dict[str, object] = field(default_factory=dict)

    def token_seconds(self, loads_per_token: float, *, everything: bool = False) -> float:
        """Seconds per token: `everything` when all experts fit, else between what was measured, and on from there."""
        if everything:
            return self.resident_seconds
        loads, seconds = np.array([(0.0, self.managed_seconds), *self.measured]).T
        beyond = max(0.0, loads_per_token - float(loads[-1])) * self.load_seconds
        return float(np.interp(loads_per_token, loads, seconds)) + beyond

    def write(self, path: Path) -> None:
        """Write the speeds as JSON."""
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def fit_speed(
    samples: Sequence[SpeedSample], *, total_bytes: int, engine: str, fingerprint: str, threads: int
) -> EngineSpeed:
    """Tell compute and loads apart.

    Means of whole budgets, because means are what is planned: steps that need many loads at once, where the text
    changes, take longer than their loads are worth elsewhere, and a line through single steps would make every load as
    dear.

    Parameters
    ----------
    samples : sequence of SpeedSample
        At least one below `total_bytes`; one that holds everything tells `resident_seconds`.
    total_bytes : int
        Memory of all experts.
    engine, fingerprint, threads
        As in :class:`EngineSpeed`.

    Raises
    ------
    RoutingDemandError
        There are too few steps.
    """
    resident = None
    means: list[tuple[float, float]] = []
    idle: list[float] = []
    for sample in samples:
        if len(sample.seconds) < _LEAST_STEPS:
            raise RoutingDemandError(
                f"Only {len(sample.seconds)} steps were measured, {_LEAST_STEPS} are needed.", "Give longer texts."
            )
        took, absent = np.array(sample.seconds), np.array(sample.loads, float)
        if sample.budget_bytes >= total_bytes:
            resident = float(np.median(took))
            continue
        usual = usual_steps(sample)
        means.append((float(absent[usual].mean()), float(took[usual].mean())))
        idle += took[usual & (absent == 0)].tolist()
    if not means:
        raise RoutingDemandError("No budget below all experts was measured.", "Measure again.")
    means.sort()
    loads, seconds = np.array(means).T
    seconds = np.maximum.accumulate(seconds)  # no noise may make loads a gain
    start = float(np.mean(idle)) if len(idle) >= _LEAST_IDLE else _at_zero(loads, seconds)
    start = min(start, float(seconds[0]))
    points = np.concatenate([[0.0], loads]), np.concatenate([[start], seconds])
    slope = max(0.0, float(np.polyfit(*points, 1)[0])) if np.ptp(points[0]) else 0.0
    return EngineSpeed(
        engine=engine,
        fingerprint=fingerprint,
        threads=threads,
        resident_seconds=start if resident is None else min(resident, start),
        managed_seconds=start,
        load_seconds=slope,
        measured=tuple(zip(loads.tolist(), seconds.tolist(), strict=True)),
    )


def _at_zero(loads: NDArray[np.float64], seconds: NDArray[np.float64]) -> float:
    """Where a line through the two budgets with the fewest loads begins, at least at half of the quicker one."""
    if len(loads) < 2 or loads[1] - loads[0] < _ALIKE:
        return float(seconds[0])
    slope = (seconds[1] - seconds[0]) / (loads[1] - loads[0])
    return float(max(seconds[0] - slope * loads[0], seconds[0] / 2))


def usual_steps(sample: SpeedSample) -> NDArray[np.bool_]:
    """Steps during which the system did nothing else, shape ``(steps,)``.

    A step counts as usual up to twice the time of most steps with about as many loads. What is left is to be averaged:
    the slower ones of these are part of a token's time.
    """
    took, loads = np.array(sample.seconds), np.array(sample.loads)
    usual = np.zeros(len(took), bool)
    order = np.argsort(loads, kind="stable")
    for part in np.array_split(order, max(1, len(took) // _LEAST_STEPS)):
        usual[part] = took[part] <= _BUSY * np.median(took[part])
    return usual


def read_speed(path: Path) -> EngineSpeed:
    """Read what :meth:`EngineSpeed.write` wrote.

    Raises
    ------
    RoutingDemandError
        It is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {data.get('schema')!r}")
        speed = EngineSpeed(**{**data, "measured": tuple(map(tuple, data.get("measured", ())))})
        figures = (speed.resident_seconds, speed.managed_seconds, speed.load_seconds, *sum(speed.measured, ()))
        if not all(np.isfinite(figures)) or min(figures) < 0 or not speed.managed_seconds:
            raise ValueError("it holds figures that are none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RoutingDemandError(
            f"{path} does not hold an engine's speeds: {error}.", "Measure them: expertier plan MODEL --calibrate."
        ) from error
    return speed
