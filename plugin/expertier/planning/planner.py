"""What every memory budget gives, and the best settings for one of them.

There are few settings and no interplay beyond them: the pool is shared by all layers, so memory divides itself, and for
a budget what is left to choose is how much to prefer resident experts. The search therefore looks at everything: all
measured settings of a budget, and (see :mod:`expertier.planning.split`) the exact best division among layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from expertier.budget import format_bytes
from expertier.errors import BudgetError
from expertier.planning.demand import RoutingDemand
from expertier.planning.speed import EngineSpeed
from expertier.planning.split import best_split

_QUOTAS_PAY_FROM = 0.015  # of all requests: less is within the noise of one trace


@dataclass(frozen=True, kw_only=True)
class QualitySetting:
    """One way of preferring resident experts under one budget, as it was measured.

    Attributes
    ----------
    bias : float
        As in :class:`expertier.virtual.VirtualSettings`.
    protect : int
        Likewise.
    loads_ratio : float
        Loads per token against the exact mode under the same budget.
    perplexity_rise : float
        Perplexity against the exact mode, minus one.
    """

    bias: float
    protect: int
    loads_ratio: float
    perplexity_rise: float


EXACT = QualitySetting(bias=0.0, protect=0, loads_ratio=1.0, perplexity_rise=0.0)


class QualityCurves(Protocol):
    """What is known of quality against bias: fulfilled by whoever holds a quality profile."""

    def settings(self, share: float) -> Sequence[QualitySetting]:
        """Settings that are known for a budget of so large a share of all experts."""


@dataclass(frozen=True, kw_only=True)
class PlannedBudget:
    """A budget, the best settings for it, and what to expect of them when one request decodes.

    Attributes
    ----------
    budget_bytes, share : int, float
        Memory for experts, and its part of all.
    setting : QualitySetting
        The fastest within the quality budget; :data:`EXACT` where that is exactness or nothing is known.
    hit_ratio, loads_per_token, bytes_per_token : float
        Expected of decode steps.
    tokens_per_second : float or None
        Expected; ``None`` when the engine's speed is unknown.
    compute_share : float or None
        Part of a token's time that is not due to loads.
    """

    budget_bytes: int
    share: float
    setting: QualitySetting
    hit_ratio: float
    loads_per_token: float
    bytes_per_token: float
    tokens_per_second: float | None
    compute_share: float | None


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Demand of the layers under a budget.

    Attributes
    ----------
    slots : tuple of int
        Experts of each layer in the best fixed division of the budget.
    loads_saved : float
        Loads per token that this division saves against the shared pool, negative if it costs some.
    quotas_pay : bool
        Whether that is worth a fixed division.
    staging_bytes : int
        Memory through which a long prompt streams: one layer that computes and the next that loads.
    prefetch_width : int or None
        Loads that one layer's compute hides, ``None`` when speeds are unknown.
    """

    slots: tuple[int, ...]
    loads_saved: float
    quotas_pay: bool
    staging_bytes: int
    prefetch_width: int | None


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """The curve, and the budget that was asked for.

    Attributes
    ----------
    chosen : PlannedBudget
        For the budget asked for.
    layers : LayerPlan
        Likewise.
    curve : tuple of PlannedBudget
        Ascending budgets from the smallest possible to all experts.
    exact_curve : tuple of PlannedBudget
        The same budgets without substitution.
    smallest_bytes, largest_bytes : int
        The edge: one token's experts; what memory leaves, at most all experts.
    """

    chosen: PlannedBudget
    layers: LayerPlan
    curve: tuple[PlannedBudget, ...]
    exact_curve: tuple[PlannedBudget, ...]
    smallest_bytes: int
    largest_bytes: int


def trade_off(
    demand: RoutingDemand,
    budget: int,
    *,
    smallest: int,
    largest: int,
    speed: EngineSpeed | None = None,
    quality: QualityCurves | None = None,
    most_rise: float = 0.0,
    points: int = 24,
) -> TradeOff:
    """Plan one budget, and draw up the curve around it.

    Parameters
    ----------
    demand : RoutingDemand
        What the model's routing asks for.
    budget : int
        Bytes for experts.
    smallest, largest : int
        Bytes of one token's experts, and the most that memory leaves.
    speed : EngineSpeed, optional
        Measured speeds.
    quality : QualityCurves, optional
        What substitution was measured to cost and to save.
    most_rise : float
        Most that perplexity may rise, as a fraction; 0 is exact.
    points : int
        Budgets on the curve.

    Raises
    ------
    BudgetError
        The budget lies outside the edge.
    """
    largest = min(largest, demand.total_bytes)
    budget = min(budget, demand.total_bytes)
    if not smallest <= budget <= largest:
        raise BudgetError(
            f"A budget of {format_bytes(budget)} is impossible here: one token needs {format_bytes(smallest)}, memory "
            f"leaves {format_bytes(max(0, largest))}.",
            "Choose a budget in between." if smallest <= largest else "Raise the memory limit or use a smaller model.",
        )
    step = (demand.total_bytes - smallest) / (points - 1)
    grid = [smallest + int(step * place) for place in range(points - 1)] + [demand.total_bytes]

    def plan(amount: int, rise: float) -> PlannedBudget:
        return _plan_one(demand, amount, speed, quality, rise)

    return TradeOff(
        chosen=plan(budget, most_rise),
        layers=_plan_layers(demand, budget, speed),
        curve=tuple(plan(amount, most_rise) for amount in grid),
        exact_curve=tuple(plan(amount, 0.0) for amount in grid),
        smallest_bytes=smallest,
        largest_bytes=largest,
    )


def _plan_one(
    demand: RoutingDemand, budget: int, speed: EngineSpeed | None, quality: QualityCurves | None, most_rise: float
) -> PlannedBudget:
    share = budget / demand.total_bytes
    known = [EXACT, *(quality.settings(share) if quality is not None and most_rise > 0 else ())]
    allowed = [setting for setting in known if setting.perplexity_rise <= most_rise]
    # Fewest loads is fastest; of equals the least lossy.
    best = min(allowed, key=lambda setting: (setting.loads_ratio, setting.perplexity_rise))
    loads = demand.loads_per_token(budget) * best.loads_ratio
    seconds = compute = None
    if speed is not None:
        seconds = speed.token_seconds(loads, everything=budget >= demand.total_bytes)
        compute = min(1.0, speed.managed_seconds / seconds)
    return PlannedBudget(
        budget_bytes=budget,
        share=share,
        setting=best,
        hit_ratio=1.0 - loads / demand.requests_per_token,
        loads_per_token=loads,
        bytes_per_token=demand.bytes_per_token(budget) * best.loads_ratio,
        tokens_per_second=None if seconds is None else 1.0 / seconds,
        compute_share=compute,
    )


def _plan_layers(demand: RoutingDemand, budget: int, speed: EngineSpeed | None) -> LayerPlan:
    found = best_split(demand.layers, budget)
    slots, loads = found if found is not None else ((0,) * len(demand.layers), float("inf"))
    saved = demand.loads_per_token(budget) - loads
    widest = max(layer.experts * layer.slot_bytes for layer in demand.layers)
    width = None
    if speed is not None:
        most = max(layer.top_k for layer in demand.layers)
        layer_seconds = speed.managed_seconds / len(demand.layers)
        width = most if not speed.load_seconds else min(most, int(layer_seconds / speed.load_seconds))
    return LayerPlan(
        slots=slots,
        loads_saved=saved if found is not None else 0.0,
        quotas_pay=found is not None and saved > _QUOTAS_PAY_FROM * demand.requests_per_token,
        staging_bytes=min(budget, 2 * widest),
        prefetch_width=width,
    )
