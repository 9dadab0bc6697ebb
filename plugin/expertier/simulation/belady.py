"""Belady's rule offline: what no policy can beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from expertier.residency.base import IntArray
from expertier.simulation.events import Events
from expertier.simulation.result import Replay

_NEVER = np.iinfo(np.int64).max


def next_uses(events: Events) -> IntArray:
    """For every member of every working set the next event that needs it, shape of :attr:`Events.set_experts`."""
    event_of = np.repeat(np.arange(len(events)), np.diff(events.set_starts))
    order = np.lexsort((event_of, events.set_experts))
    experts, times = events.set_experts[order], event_of[order]
    following = np.full(len(order), _NEVER)
    same = experts[1:] == experts[:-1]
    following[:-1][same] = times[1:][same]
    result = np.empty(len(order), np.int64)
    result[order] = following
    return result


def belady(events: Events, budget: int, *, seen: Callable[[int], None] | None = None) -> Replay:
    """Evict whatever is needed again last; one pool for all layers.

    An event is atomic: its whole working set is resident at once, and nothing of it makes room for the rest.

    Parameters
    ----------
    events : Events
        The trace.
    budget : int
        Bytes the pool may hold.
    seen : callable, optional
        Told the number of steps done, now and then.

    Raises
    ------
    BudgetError
        Some working set does not fit.

    Notes
    -----
    With experts of one size this is the least number of loads any policy can have. With several sizes nobody knows the
    best in reasonable time, and the rule is only a very good policy.
    """
    events.check_budget(budget)
    uses = next_uses(events)
    slots, sizes = events.slot_bytes, events.load_bytes
    next_use = np.full(len(slots), _NEVER)
    resident = np.zeros(len(slots), bool)
    free = budget
    misses = np.zeros(len(events), np.int64)
    bytes_read = np.zeros(len(events), np.int64)
    starts = events.set_starts.tolist()
    for event in range(len(events)):
        start, stop = starts[event], starts[event + 1]
        wanted = events.set_experts[start:stop]
        next_use[wanted] = uses[start:stop]
        absent = wanted[~resident[wanted]]
        if not absent.size:
            continue
        resident[wanted] = False  # none of them is a victim
        lacking = int(slots[absent].sum()) - free
        if lacking > 0:
            candidates = np.flatnonzero(resident)
            order = candidates[np.argsort(-next_use[candidates], kind="stable")]
            count = int(np.searchsorted(np.cumsum(slots[order]), lacking)) + 1
            resident[order[:count]] = False
            free += int(slots[order[:count]].sum())
        resident[wanted] = True
        free -= int(slots[absent].sum())
        misses[event] = len(absent)
        bytes_read[event] = sizes[absent].sum()
        if seen is not None and event % 1024 == 0:
            seen(int(events.step[event]))
    return Replay.of(events, policy="belady", budget=budget, misses=misses, bytes_read=bytes_read)
