"""Replays a trace through the real offload manager: there is no second implementation of what it decides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from expertier.manager import ManagerConfig, OffloadManager
from expertier.routing.trace_format import PREFILL
from expertier.simulation.events import Events
from expertier.simulation.loads import AdapterLoads
from expertier.simulation.pools import InstantPool
from expertier.simulation.result import Replay

__all__ = ["Replay", "policy_name", "replay"]


def policy_name(policy: str, half_life: float | None) -> str:
    """Return a policy as records write it: with its half-life where that is not the usual one."""
    return policy if half_life is None else f"{policy}:{half_life:g}"


def replay(
    events: Events,
    policy: str,
    budget: int,
    *,
    half_life: float | None = None,
    forecasts: Callable[[OffloadManager], AdapterLoads] | None = None,
    seen: Callable[[int], None] | None = None,
) -> Replay:
    """Replay a trace without prefetching: hits, misses and bytes are exactly those of an adapter.

    Parameters
    ----------
    events : Events
        The trace.
    policy : str
        A key of :data:`expertier.residency.POLICIES`.
    budget : int
        Bytes the pool may hold.
    half_life : float, optional
        As in :class:`expertier.manager.ManagerConfig`.
    forecasts : callable, optional
        Makes of the manager what tells it forecasts.
    seen : callable, optional
        Told the number of steps done, now and then.

    Raises
    ------
    BudgetError
        Some working set does not fit.
    UnsupportedOptionError
        The policy is unknown, or has no half-life.
    """
    events.check_budget(budget)
    layers = events.header.layers
    pool = InstantPool(layers)
    manager = OffloadManager(
        experts={layer.layer: layer.experts for layer in layers},
        top_k={layer.layer: layer.top_k for layer in layers},
        pool=pool,
        budget=budget,
        config=ManagerConfig(policy=policy, half_life=half_life, io_threads=1),
    )
    teller = None if forecasts is None else forecasts(manager)
    misses = np.zeros(len(events), np.int64)
    bytes_read = np.zeros(len(events), np.int64)
    sizes = events.load_bytes
    numbers = [layer.layer for layer in layers]
    places, starts = events.layer.tolist(), events.step_starts.tolist()
    try:
        for step, (tokens, phase) in enumerate(zip(events.tokens.tolist(), events.phase.tolist(), strict=True)):
            if teller is not None:
                teller.begin_step(step)
            manager.begin_step(tokens, "prefill" if phase == PREFILL else "decode")
            for event in range(starts[step], starts[step + 1]):
                layer, routes = numbers[places[event]], events.routes(event)
                manager.observe(layer, routes)
                manager.acquire(layer, routes, wait=False).release()
                if teller is not None:
                    teller.after_router(event)
                if pool.loads:
                    misses[event] = len(pool.loads)
                    bytes_read[event] = sizes[pool.loads].sum()
                    pool.loads.clear()
            manager.end_step()
            if seen is not None and step % 256 == 0:
                seen(step)
    finally:
        manager.close()
    return Replay.of(events, policy=policy_name(policy, half_life), budget=budget, misses=misses, bytes_read=bytes_read)
