"""The best division of a budget among layers, found exactly.

Loads per token add up over layers, so dynamic programming over layers and units of memory finds the optimum of what
SwapMoE's genetic search approximates, in milliseconds. It tells each layer's demand. Whether dividing the pool pays at
all is another question: a shared pool already gives each layer what its experts deserve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from expertier.planning.demand import LayerDemand

_MOST_UNITS = 8192


def best_split(layers: Sequence[LayerDemand], budget: int) -> tuple[tuple[int, ...], float] | None:
    """Divide a budget among layers so that loads per token are fewest.

    Parameters
    ----------
    layers : sequence of LayerDemand
        What each layer asks for.
    budget : int
        Bytes.

    Returns
    -------
    slots : tuple of int
        Experts of each layer, never together more than `budget`.
    loads : float
        Loads per token.
    ``None`` if not every layer can hold one token's experts.
    """
    unit = math.gcd(*(layer.slot_bytes for layer in layers))
    unit *= max(1, -(-budget // unit // _MOST_UNITS))  # coarser for big models: rounded up, so never over the budget
    costs = [-(-layer.slot_bytes // unit) for layer in layers]
    units = min(budget // unit, sum(layer.experts * cost for layer, cost in zip(layers, costs, strict=True)))
    best = np.zeros(units + 1)  # fewest loads of the layers so far within so many units
    chosen = []
    for layer, cost in zip(layers, costs, strict=True):
        following = np.full(units + 1, np.inf)
        choice = np.zeros(units + 1, np.int64)
        for slots in range(min(layer.top_k, layer.experts), min(layer.experts, units // cost) + 1):
            used = slots * cost
            loads = best[: units + 1 - used] + layer.misses[slots]
            better = loads < following[used:]
            following[used:][better] = loads[better]
            choice[used:][better] = slots
        best = following
        chosen.append(choice)
    if not np.isfinite(best[units]):
        return None
    left, slots_of = units, []
    for choice, cost in zip(reversed(chosen), reversed(costs), strict=True):
        slots = int(choice[left])
        slots_of.append(slots)
        left -= slots * cost
    return tuple(reversed(slots_of)), float(best[units])
