"""What a budget means for a model on this machine, as far as it is known before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertier.budget import format_bytes, parse_budget
from expertier.catalog.types import Catalog
from expertier.errors import BudgetError
from expertier.planning.calibrate import DiskSpeed
from expertier.planning.memory import MemoryLimit

_MARGIN_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A budget and what follows from it.

    Attributes
    ----------
    asked : str
        The budget as it was written.
    budget_bytes : int
        Memory for experts.
    budget_is_estimate : bool
        Whether the final figure is only known once the engine has taken its share (budget ``auto``).
    total_bytes, other_bytes : int
        All experts, and everything else in the model.
    smallest_bytes : int
        Enough for one token.
    full_step_bytes : int
        Enough for every prompt step of `n_ubatch` tokens whatever the routes.
    n_ubatch, safe_ubatch : int
        Tokens of a prompt step, and the most that fit this budget whatever the routes.
    resident_experts, total_experts : int
        Experts that fit, and all.
    token_bytes : int
        Expert bytes one token needs.
    uniform_hit_ratio : float
        Hit ratio if every route were equally likely: the share that is resident. Trained routers are skewed and hit
        more often.
    uniform_missed_bytes : float
        Bytes read per token at that hit ratio.
    disk : DiskSpeed or None
        Measured speed of the storage.
    uniform_tokens_per_second : float or None
        Tokens per second that reading alone allows at that hit ratio; compute comes on top and is not known here.
        ``None`` without a measurement, or when nothing is read.
    memory : MemoryLimit
        The tightest memory limit.
    """

    asked: str
    budget_bytes: int
    budget_is_estimate: bool
    total_bytes: int
    other_bytes: int
    smallest_bytes: int
    full_step_bytes: int
    n_ubatch: int
    safe_ubatch: int
    resident_experts: int
    total_experts: int
    token_bytes: int
    uniform_hit_ratio: float
    uniform_missed_bytes: float
    disk: DiskSpeed | None
    uniform_tokens_per_second: float | None
    memory: MemoryLimit


def make_plan(
    catalog: Catalog,
    budget: str | int,
    *,
    limits: Sequence[MemoryLimit],
    disk: DiskSpeed | None = None,
    margin: str | int = "auto",
    n_ubatch: int = 512,
) -> Plan:
    """Work out what a budget means.

    Parameters
    ----------
    catalog : Catalog
        The model.
    budget : str or int
        As the user wrote it.
    limits : sequence of MemoryLimit
        What :func:`expertier.planning.memory.memory_limits` returned.
    disk : DiskSpeed, optional
        Measured storage.
    margin : str or int
        What budget ``auto`` leaves free.
    n_ubatch : int
        Tokens of a prompt step.

    Raises
    ------
    BudgetError
        The budget cannot be read, cannot hold one token's experts, or does not fit into memory beside the rest of
        the model.
    """
    tightest = limits[0]
    total = catalog.total_expert_bytes
    asked = parse_budget(budget, total)
    if asked is None:
        spare = _MARGIN_BYTES + tightest.left // 100 if margin == "auto" else parse_budget(margin, tightest.left) or 0
        amount = min(total, tightest.left - catalog.other_bytes - spare)
    else:
        amount = min(total, asked)
    smallest = catalog.smallest_budget()
    if amount < smallest:
        if asked is None:
            raise BudgetError(
                f"{_place(tightest)} leaves {format_bytes(max(0, amount))} for experts beside "
                f"{format_bytes(catalog.other_bytes)} of other weights; one token needs {format_bytes(smallest)}.",
                "Raise the memory limit or use a smaller model.",
            )
        raise BudgetError(
            f"The budget {format_bytes(amount)} cannot hold the experts of one token ({format_bytes(smallest)}).",
            f"Give at least {format_bytes(smallest)}.",
        )
    if amount + catalog.other_bytes > tightest.left:
        raise BudgetError(
            f"The budget {format_bytes(amount)} and {format_bytes(catalog.other_bytes)} of other weights do not fit: "
            f"{_place(tightest)} has {format_bytes(tightest.left)} left.",
            "Lower the budget, or write auto for all that is left.",
        )
    resident = _resident_experts(catalog, amount)
    token_bytes = sum(layer.top_k * layer.expert_bytes for layer in catalog.layers)
    share = min(1.0, amount / total)
    missed = token_bytes * (1 - share)
    return Plan(
        asked=str(budget),
        budget_bytes=amount,
        budget_is_estimate=asked is None and amount < total,
        total_bytes=total,
        other_bytes=catalog.other_bytes,
        smallest_bytes=smallest,
        full_step_bytes=catalog.smallest_budget(n_ubatch),
        n_ubatch=n_ubatch,
        safe_ubatch=_safe_ubatch(catalog, amount, n_ubatch),
        resident_experts=resident,
        total_experts=catalog.expert_count,
        token_bytes=token_bytes,
        uniform_hit_ratio=share,
        uniform_missed_bytes=missed,
        disk=disk,
        uniform_tokens_per_second=disk.random / missed if disk is not None and missed else None,
        memory=tightest,
    )


def _resident_experts(catalog: Catalog, amount: int) -> int:
    """Experts that certainly fit: the largest first."""
    count = 0
    for layer in sorted(catalog.layers, key=lambda layer: -layer.expert_bytes):
        fits = min(layer.experts, amount // layer.expert_bytes)
        count += fits
        amount -= fits * layer.expert_bytes
    return count


def _safe_ubatch(catalog: Catalog, amount: int, n_ubatch: int) -> int:
    safe = n_ubatch
    for layer in catalog.layers:
        fits = amount // layer.expert_bytes
        if fits < layer.experts:
            safe = min(safe, fits // layer.top_k)
    return safe


def _place(limit: MemoryLimit) -> str:
    return "This machine" if limit.source == "machine" else f"The control group {limit.source}"
