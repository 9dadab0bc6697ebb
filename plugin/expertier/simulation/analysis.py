"""What a trace shows about a model's routing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import IntArray
from expertier.routing.trace_format import PREFILL
from expertier.simulation.events import Events


@dataclass(frozen=True, kw_only=True)
class Skew:
    """How unevenly a layer uses its experts, in decode steps.

    Attributes
    ----------
    layer : int
        Index of the transformer layer.
    entropy : float
        Bits; uniform routing has log2(experts).
    hottest_quarter : float
        Share of routes that go to the most used quarter of experts.
    repeated : float
        Share of a token's experts that the step before used, too; ``nan`` if there is none.
    """

    layer: int
    entropy: float
    hottest_quarter: float
    repeated: float


def usage(events: Events) -> NDArray[np.float64]:
    """How often each expert is used in decode steps, shape ``(layers, most experts)``; ``nan`` where a layer has fewer.

    A row sums to 1.
    """
    chosen = np.repeat(events.decode, np.diff(events.route_starts))
    place = np.repeat(events.layer, np.diff(events.route_starts))[chosen]
    counts = [layer.experts for layer in events.header.layers]
    table = np.full((len(counts), max(counts)), np.nan)
    for row, count in enumerate(counts):
        used = np.bincount(events.route_experts[chosen][place == row], minlength=count)
        table[row, :count] = used / max(used.sum(), 1)
    return table


def skew(events: Events) -> list[Skew]:
    """Measure every layer."""
    shares = usage(events)
    found = []
    for row, layer in enumerate(events.header.layers):
        share = shares[row, : layer.experts]
        used = share[share > 0]
        hottest = np.sort(share)[::-1][: max(1, layer.experts // 4)]
        found.append(
            Skew(
                layer=layer.layer,
                entropy=float(-(used * np.log2(used)).sum()) if used.size else 0.0,
                hottest_quarter=float(hottest.sum()),
                repeated=_repeated(events, row),
            )
        )
    return found


def _repeated(events: Events, row: int) -> float:
    mine = np.flatnonzero((events.layer == row) & events.decode)
    if len(mine) < 2:
        return float("nan")
    total = events.header.total_experts
    sizes = np.diff(events.set_starts)[mine]
    order = np.repeat(np.arange(len(mine)), sizes)
    places = np.repeat(events.set_starts[mine] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    keys = order * total + events.set_experts[places]
    return float(np.isin(keys[order > 0] - total, keys).mean())


def reuse_distances(events: Events) -> IntArray:
    """Distance of every use to the use before, in distinct experts of all layers used in between, itself included.

    Returns
    -------
    ndarray of int64, shape (uses,)
        In order of events, decode steps only; 0 for a first use. An LRU pool of n experts hits, event by event, about
        the uses of distance 1 to n.
    """
    total = events.header.total_experts
    last = np.full(total, -1, np.int64)
    found = []
    starts = events.set_starts.tolist()
    decode = (events.phase != PREFILL)[events.step].tolist()
    for event in range(len(events)):
        wanted = events.set_experts[starts[event] : starts[event + 1]]
        if decode[event]:
            before = last[wanted]
            found.append(np.where(before < 0, 0, (last[None, :] >= before[:, None]).sum(axis=1)))
        last[wanted] = event
    return np.concatenate(found) if found else np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One layer's turn on the time line, seconds from its beginning: compute, waiting, and when its loads arrived."""

    token: int
    layer: int
    start: float
    loaded: float
    end: float
    loads: int


def time_line(
    events: Events, misses: IntArray, transfer: NDArray[np.float64], compute: float, tokens: int
) -> list[Turn]:
    """Lay out the last decode steps of a replay without prefetching.

    Parameters
    ----------
    events : Events
        The trace.
    misses, transfer : ndarray, shape (events,)
        Loads of every event and the seconds they take.
    compute : float
        Seconds of compute in one event.
    tokens : int
        Steps to lay out.
    """
    steps = np.flatnonzero(events.phase != PREFILL)[-tokens:]
    now = 0.0
    turns = []
    for number, step in enumerate(steps.tolist()):
        for event in range(int(events.step_starts[step]), int(events.step_starts[step + 1])):
            loaded = now + float(transfer[event])
            turns.append(
                Turn(
                    token=number,
                    layer=events.header.layers[events.layer[event]].layer,
                    start=now,
                    loaded=loaded,
                    end=loaded + compute,
                    loads=int(misses[event]),
                )
            )
            now = loaded + compute
    return turns
