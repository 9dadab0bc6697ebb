"""What a model's routing asks for, small enough to plan with in no time: made once per model from a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertier.errors import RoutingDemandError

SCHEMA = "expertier-routing-demand/1"


@dataclass(frozen=True, kw_only=True)
class BudgetPoint:
    """What one budget was replayed to mean, in decode steps of one request.

    Attributes
    ----------
    budget_bytes : int
        The budget.
    hit_ratio : float
        Share of needed experts that were resident.
    loads_per_token, bytes_per_token : float
        Loads of absent experts, and what they read.
    """

    budget_bytes: int
    hit_ratio: float
    loads_per_token: float
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class LayerDemand:
    """What one layer asks for.

    Attributes
    ----------
    layer, experts, top_k, slot_bytes : int
        The layer, and memory of one of its experts.
    misses : tuple of float
        Loads per token if the layer had 0, 1, ... `experts` slots of its own.
    """

    layer: int
    experts: int
    top_k: int
    slot_bytes: int
    misses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RoutingDemand:
    """A model's routing, as the planner needs it.

    Attributes
    ----------
    fingerprint, model : str
        Identity and name of the model.
    policy : str
        Eviction policy of the replays.
    tokens : int
        Decoded tokens they counted.
    total_bytes : int
        Memory of all experts.
    points : tuple of BudgetPoint
        Ascending budgets, from the smallest possible to all experts.
    layers : tuple of LayerDemand
        In the order of the model.
    """

    schema: str = SCHEMA
    fingerprint: str
    model: str
    policy: str
    tokens: int
    total_bytes: int
    points: tuple[BudgetPoint, ...]
    layers: tuple[LayerDemand, ...]

    @cached_property
    def _columns(self) -> NDArray[np.float64]:
        rows = [(point.budget_bytes, point.loads_per_token, point.bytes_per_token) for point in self.points]
        return np.array(rows).T

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget it knows about."""
        return self.points[0].budget_bytes

    @property
    def requests_per_token(self) -> float:
        """Experts one token needs."""
        return float(sum(layer.top_k for layer in self.layers))

    def loads_per_token(self, budget: int) -> float:
        """Loads per token under any budget, straight lines between those replayed."""
        budgets, loads, _ = self._columns
        return float(np.interp(budget, budgets, loads))

    def bytes_per_token(self, budget: int) -> float:
        """Bytes read per token under any budget."""
        budgets, _, volume = self._columns
        return float(np.interp(budget, budgets, volume))

    def hit_ratio(self, budget: int) -> float:
        """Share of needed experts that are resident under any budget."""
        return 1.0 - self.loads_per_token(budget) / self.requests_per_token

    def require_model(self, fingerprint: str, name: str) -> None:
        """Refuse what is of another model.

        Raises
        ------
        RoutingDemandError
            It is another model's.
        """
        if self.fingerprint != fingerprint:
            raise RoutingDemandError(
                f"The routes are of {self.model} ({self.fingerprint[:12]}), not of {name} ({fingerprint[:12]}).",
                f"Make one: expertier profile {name} --text FILE.",
            )

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_demand(path: Path) -> RoutingDemand:
    """Read what :meth:`RoutingDemand.write` wrote.

    Raises
    ------
    RoutingDemandError
        It is none, or contradicts itself.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {data.get('schema')!r}")
        found = RoutingDemand(
            **{
                **data,
                "points": tuple(BudgetPoint(**point) for point in data["points"]),
                "layers": tuple(
                    LayerDemand(**{**layer, "misses": tuple(float(value) for value in layer["misses"])})
                    for layer in data["layers"]
                ),
            }
        )
        _check(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RoutingDemandError(
            f"{path} is not a summary of routes: {error}.", "Make one: expertier profile MODEL --text FILE."
        ) from error
    return found


def _check(found: RoutingDemand) -> None:
    budgets = [point.budget_bytes for point in found.points]
    if not budgets or sorted(set(budgets)) != budgets or not found.layers:
        raise ValueError("its budgets are not in ascending order")
    figures: list[Sequence[float]] = [(point.loads_per_token, point.bytes_per_token) for point in found.points]
    figures += [layer.misses for layer in found.layers]
    if not all(np.isfinite(row).all() and min(row) >= 0 for row in figures):
        raise ValueError("it holds figures that are none")
    if any(len(layer.misses) != layer.experts + 1 for layer in found.layers):
        raise ValueError("a layer's demand is incomplete")
