"""A trace summed up for the planner: what every budget means, by replay, and what each layer asks for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from expertier.planning.demand import BudgetPoint, LayerDemand, RoutingDemand
from expertier.residency.lfu import DEFAULT_HALF_LIFE
from expertier.simulation.events import Events
from expertier.simulation.replay import policy_name, replay

SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_WARM_UP = 0.1  # of the steps: loads into an empty pool say nothing about serving


def summarise(
    events: Events,
    *,
    policy: str = "lfu",
    half_life: float | None = None,
    seen: Callable[[float], None] | None = None,
) -> RoutingDemand:
    """Replay a trace under budgets from the smallest possible to nearly all experts.

    Parameters
    ----------
    events : Events
        The trace.
    policy : str
        A key of :data:`expertier.residency.POLICIES`.
    half_life : float, optional
        As in :class:`expertier.manager.ManagerConfig`.
    seen : callable, optional
        Told the share of the work that is done, now and then.
    """
    total = events.header.total_bytes
    least = events.least_budget
    budgets = sorted({least, *(int(share * total) for share in SHARES if share * total > least)})
    counted = events.decode & (events.step >= int(_WARM_UP * len(events.phase)))
    tokens = int(events.tokens[np.unique(events.step[counted])].sum())
    requests = int(np.diff(events.set_starts)[counted].sum())
    points = []
    for done, budget in enumerate(budgets):

        def step_seen(step: int, done: int = done) -> None:
            if seen is not None:
                seen((done + step / len(events.phase)) / len(budgets))

        found = replay(events, policy, budget, half_life=half_life, seen=step_seen)
        misses = int(found.misses[counted].sum())
        points.append(
            BudgetPoint(
                budget_bytes=budget,
                hit_ratio=1.0 - misses / requests,
                loads_per_token=misses / tokens,
                bytes_per_token=float(found.bytes_read[counted].sum()) / tokens,
            )
        )
    points.append(BudgetPoint(budget_bytes=total, hit_ratio=1.0, loads_per_token=0.0, bytes_per_token=0.0))
    return RoutingDemand(
        fingerprint=events.header.fingerprint,
        model=events.header.model or events.header.architecture,
        policy=policy_name(policy, half_life),
        tokens=tokens,
        total_bytes=total,
        points=tuple(points),
        layers=_demand(events, counted),
    )


def _demand(events: Events, counted: NDArray[np.bool_]) -> tuple[LayerDemand, ...]:
    """Loads of each layer by its number of slots.

    An expert that is the n-th most deserving of its layer is resident if the layer has more than n slots (the inclusion
    property: deserts do not depend on the memory), so one pass gives all numbers of slots.
    """
    found = []
    for place, layer in enumerate(events.header.layers):
        ranks = np.zeros(layer.experts + 1)
        worth = np.zeros(layer.experts)
        tokens = step = 0
        for event in np.flatnonzero((events.layer == place) & events.decode).tolist():
            now = int(events.step[event])
            worth *= 2.0 ** (-(now - step) / DEFAULT_HALF_LIFE)
            step = now
            routes = events.routes(event)
            wanted = np.unique(routes)
            if counted[event]:
                deserving = (worth[None, :] > worth[wanted][:, None]).sum(axis=1)
                ranks += np.bincount(deserving, minlength=layer.experts + 1)
                tokens += len(routes)
            np.add.at(worth, routes.ravel(), 1.0)
        misses = ranks[::-1].cumsum()[::-1] / max(tokens, 1)
        found.append(
            LayerDemand(
                layer=layer.layer,
                experts=layer.experts,
                top_k=layer.top_k,
                slot_bytes=layer.slot_bytes,
                misses=(*misses[:-1].tolist(), 0.0),
            )
        )
    return tuple(found)
