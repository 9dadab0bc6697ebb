"""Replays a trace with loads ahead of the router, in simulated time, through the real offload manager."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from expertier.errors import UnsupportedOptionError
from expertier.manager import ManagerConfig, OffloadManager
from expertier.residency.base import IntArray
from expertier.routing.trace_format import PREFILL
from expertier.simulation.disk import OneThread, SimulatedDisk
from expertier.simulation.events import Events
from expertier.simulation.loads import Candidates, Oracle, OracleLoads, StepLoads
from expertier.simulation.pools import PlanningPool
from expertier.simulation.timing import Timing
from expertier.storage import ReadQueue


class PerfectAhead:
    """An oracle: the next layers' experts exactly, at most `layers` ahead and within the step."""

    def __init__(self, events: Events, layers: int = 1) -> None:
        self._events = events
        self._layers = layers

    def after_router(self, event: int) -> Iterable[Candidates]:
        events = self._events
        stop = min(event + self._layers, int(events.step_starts[events.step[event] + 1]) - 1)
        for later in range(event + 1, stop + 1):
            place = int(events.layer[later])
            yield events.header.layers[place].layer, events.working_set(later) - events.base[place], None


class PreviousToken:
    """A control: the next layer will use what it used in the step before."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._last: dict[int, int] = {}  # place of a layer to its last event

    def after_router(self, event: int) -> Iterable[Candidates]:
        place = int(self._events.layer[event])
        self._last[place] = event
        last = self._last.get(place + 1)
        if last is None:
            return
        experts = self._events.working_set(last) - self._events.base[place + 1]
        yield self._events.header.layers[place + 1].layer, experts, np.full(len(experts), 0.5)


PREDICTORS: dict[str, Callable[[Events], Oracle]] = {
    "perfect": PerfectAhead,
    "perfect4": lambda events: PerfectAhead(events, 4),
    "previous": PreviousToken,
}


@dataclass(frozen=True, kw_only=True)
class TimedReplay:
    """What a replay in simulated time found, in decode steps.

    Attributes
    ----------
    ready_hits, late, misses : int
        Experts resident when needed, under way, and absent.
    bytes_read : int
        Bytes of all loads, given-up ones as far as they got.
    prefetches, prefetches_used : int
        Loads begun ahead of need, and those needed afterwards; prompts included.
    ahead : int
        Experts of decode steps that were loaded ahead, or being loaded, when first needed.
    seconds, stall_seconds : float
        Decode steps altogether, and the part spent waiting.
    steps, tokens : int
        Decode steps and their tokens.
    """

    ready_hits: int
    late: int
    misses: int
    bytes_read: int
    prefetches: int
    prefetches_used: int
    ahead: int
    seconds: float
    stall_seconds: float
    steps: int
    tokens: int


class SimulatedManager(OffloadManager):
    """The offload manager with a simulated device below it. One thread, simulated time."""

    def __init__(
        self,
        events: Events,
        budget: int,
        timing: Timing,
        *,
        policy: str,
        half_life: float | None = None,
        fill: bool = False,
    ) -> None:
        layers = events.header.layers
        self._timing = timing
        super().__init__(
            experts={layer.layer: layer.experts for layer in layers},
            top_k={layer.layer: layer.top_k for layer in layers},
            pool=PlanningPool(layers),
            budget=budget,
            config=ManagerConfig(policy=policy, half_life=half_life, io_threads=1, fill=fill),
        )
        self._lock = cast(Any, OneThread(self.disk))
        self._load_cost = timing.load_cost

    def prefetch(
        self, layer: int, experts: Sequence[int] | IntArray, probabilities: ArrayLike | None = None, *, limit: int
    ) -> int:
        begun = super().prefetch(layer, experts, probabilities, limit=limit)
        if begun:
            self.disk.advance(begun * self._load_cost)
        return begun

    def _read_queue(self) -> ReadQueue:
        self.disk = SimulatedDisk(self._on_done, bandwidth=self._timing.bandwidth, latency=self._timing.latency)
        return self.disk

    @property
    def prefetches_used(self) -> int:
        """Loads ahead of need that were needed so far."""
        return self._stats.prefetches_used


LoadsOn = Callable[[SimulatedManager], StepLoads]
"""Makes of a manager what loads ahead on it."""


def oracle_loads(name: str, events: Events, *, ahead: int = 2) -> LoadsOn:
    """Load what the oracle or control called `name` says, with at most `ahead` loads under way.

    Raises
    ------
    UnsupportedOptionError
        There is none of that name.
    """
    if name not in PREDICTORS:
        raise UnsupportedOptionError(f"There is no predictor {name!r}.", f"Choose from: {', '.join(PREDICTORS)}.")
    oracle = PREDICTORS[name](events)
    return lambda manager: OracleLoads(manager, oracle, ahead=ahead)


def replay_timed(
    events: Events,
    policy: str,
    budget: int,
    timing: Timing,
    *,
    half_life: float | None = None,
    loads: LoadsOn | None = None,
    fill: bool = False,
    seen: Callable[[int], None] | None = None,
) -> TimedReplay:
    """Replay a trace in simulated time.

    Parameters
    ----------
    events, policy, budget, half_life, seen
        As for :func:`expertier.simulation.replay.replay`.
    timing : Timing
        Speeds.
    loads : callable, optional
        Makes of the manager what loads ahead on it.
    fill : bool
        Whether free room fills itself, as in :class:`expertier.manager.ManagerConfig`.

    Raises
    ------
    BudgetError
        Some working set does not fit.
    """
    events.check_budget(budget)
    manager = SimulatedManager(events, budget, timing, policy=policy, half_life=half_life, fill=fill)
    ahead = None if loads is None else loads(manager)
    disk = manager.disk
    layers = events.header.layers
    places, starts = events.layer.tolist(), events.step_starts.tolist()
    compute = timing.layer_compute(events)
    head, tail = compute * (1 - timing.expert_share), compute * timing.expert_share
    seconds = stall = 0.0
    read = used = 0

    for step, (tokens, phase) in enumerate(zip(events.tokens.tolist(), events.phase.tolist(), strict=True)):
        begun, begun_read = disk.now, disk.bytes_read
        waited = 0.0
        begun_used = manager.prefetches_used
        predicting = 0.0 if phase == PREFILL else timing.prediction / 2
        if ahead is not None:
            disk.advance(predicting)
            ahead.begin_step(step)
        manager.begin_step(tokens, "prefill" if phase == PREFILL else "decode")
        for event in range(starts[step], starts[step + 1]):
            layer = layers[places[event]]
            routes = events.routes(event)
            disk.advance(head)
            manager.observe(layer.layer, routes)
            if timing.load_cost:
                own = routes if len(routes) == 1 else np.unique(routes)
                absent = ~manager.resident(layer.layer, arriving=True)
                disk.advance(timing.load_cost * int(absent[own].sum()))
            with manager.acquire(layer.layer, routes, wait=False) as lease:
                if ahead is not None:
                    ahead.after_router(event)
                    disk.advance(predicting / (starts[step + 1] - starts[step]))
                for stage in range(layer.stages):
                    before = disk.now
                    lease.wait(stage)
                    waited += disk.now - before
                    disk.advance(tail / layer.stages)
        manager.end_step()
        if phase != PREFILL:
            seconds += disk.now - begun
            stall += waited
            read += disk.bytes_read - begun_read
            used += manager.prefetches_used - begun_used
        if seen is not None and step % 256 == 0:
            seen(step)
    stats = manager.stats()
    return TimedReplay(
        ready_hits=stats.decode.ready_hits,
        late=stats.decode.late,
        misses=stats.decode.misses,
        bytes_read=read,
        prefetches=stats.prefetches,
        prefetches_used=stats.prefetches_used,
        ahead=used,
        seconds=seconds,
        stall_seconds=stall,
        steps=stats.decode.steps,
        tokens=stats.decode.tokens,
    )
