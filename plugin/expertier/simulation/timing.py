"""How long decoding takes, from what was loaded when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertier.simulation.events import Events
from expertier.simulation.result import Replay


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Speeds of a machine, from calibration.

    Attributes
    ----------
    bandwidth : float
        Bytes per second that loads of experts reach.
    latency : float
        Seconds from asking for the first absent expert of an event to its first byte.
    compute : float
        Seconds a decode step takes with everything resident.
    load_cost : float
        Seconds of the engine's own time per load (bookkeeping, moving memory).
    prediction : float
        Seconds that a decode step's forecast, its corrections and reads beside the engine take from it: half of them
        before the first layer, the rest after its routers.
    expert_share : float
        Part of `compute` that multiplies experts; only this overlaps with loads of later parts of the same experts.
    """

    bandwidth: float
    compute: float
    latency: float = 0.0
    load_cost: float = 0.0
    prediction: float = 0.0
    expert_share: float = 0.8

    def layer_compute(self, events: Events) -> float:
        """Seconds of compute in one event, all layers being equal."""
        return self.compute / len(events.header.layers)

    def transfer(self, replay: Replay) -> NDArray[np.float64]:
        """Seconds the storage is busy for every event, shape ``(events,)``."""
        return replay.bytes_read / self.bandwidth + self.latency * (replay.misses > 0)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds per decode step under three assumptions.

    Attributes
    ----------
    demand : float
        Loads begin when the router has chosen; parts of an expert are computed while later ones load.
    one_layer : float
        Perfect prefetch: what a layer lacks begins to load when the router of the layer before has chosen.
    bound : float
        The storage never idles and nothing waits but for it: the longer of compute and transfer.
    """

    demand: float
    one_layer: float
    bound: float


def staged_end(
    wait: NDArray[np.floating], read: NDArray[np.floating], stages: NDArray[np.int64], tail: float
) -> NDArray[np.float64]:
    """Time events in which parts of an expert are computed while later ones load.

    Parameters
    ----------
    wait, read : ndarray of float, shape (events,)
        Seconds to the first byte, and of transfer.
    stages : ndarray of int64, shape (events,)
        Parts that arrive and are computed one after the other.
    tail : float
        Seconds all parts together compute.

    Returns
    -------
    ndarray of float64, shape (events,)
        Seconds from asking to the end of the last part.
    """
    end = np.zeros(len(read))
    for stage in range(int(stages.max())):
        arrival = wait + read * np.minimum(stage + 1, stages) / stages
        end = np.where(stage < stages, np.maximum(end, arrival) + tail / stages, end)
    return end


def step_times(events: Events, replay: Replay, timing: Timing) -> StepTimes:
    """Time the decode steps of a replay."""
    chosen = events.decode
    stages = np.array([layer.stages for layer in events.header.layers])[events.layer[chosen]]
    transfer = timing.transfer(replay)[chosen]
    cost = timing.load_cost * replay.misses[chosen]
    compute = timing.layer_compute(events)
    steps = replay.steps
    head, tail = compute * (1 - timing.expert_share), compute * timing.expert_share
    read = replay.bytes_read[chosen] / timing.bandwidth
    wait = transfer - read
    demand = float((head + cost + staged_end(wait, read, stages, tail)).sum())
    total_compute = compute * int(chosen.sum()) + float(cost.sum())
    return StepTimes(
        demand=demand / steps,
        one_layer=_one_layer_ahead(wait.tolist(), read.tolist(), stages.tolist(), cost.tolist(), head, tail) / steps,
        bound=max(total_compute, float(read.sum())) / steps,
    )


def _one_layer_ahead(
    wait: list[float], read: list[float], stages: list[int], cost: list[float], head: float, tail: float
) -> float:
    now = disk = 0.0  # when the last event ended, and when the storage is free
    asked = head  # when the router of the event before had chosen; nobody came before the first
    for latency, volume, parts, own_cost in zip(wait, read, stages, cost, strict=True):
        begun = max(asked, disk) + latency
        disk = begun + volume
        asked = now + head + own_cost
        now = asked
        for part in range(1, parts + 1):
            now = max(now, begun + volume * part / parts) + tail / parts
    return now
