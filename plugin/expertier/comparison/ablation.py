"""What each part of Expertier is worth: arms that add one at a time, and the bounds above them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertier.catalog.types import Catalog
from expertier.comparison.records import ArmRecord, Bound, Comparison
from expertier.routing.trace import Trace
from expertier.simulation.events import load_events
from expertier.simulation.sweep import BELADY, Arm, run_arm
from expertier.simulation.timing import Timing

_PADDING = 64 << 10
_NOTHING = {"lookahead": "off", "predictor": "off"}
PREDICTORS = ("table", "path", "blend")
"""Predictors that get an arm, each in place of the one before."""


def ablation(catalog: Catalog, predictors: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Arms by name, each with the options that make it.

    Parameters
    ----------
    catalog : Catalog
        The model.
    predictors : mapping of str to str
        Those of :data:`PREDICTORS` that were trained, and the option that names each.
    """
    # Loading ahead is always on here: "auto" would spend most of a short run on trials with and without it.
    # A prompt's step needs a whole layer; next to nothing is kept beyond that. Slots are padded to pages.
    least = max(layer.experts * (layer.expert_bytes + _PADDING) for layer in catalog.layers)
    arms: dict[str, dict[str, Any]] = {
        "on demand": {**_NOTHING, "policy": "lru", "budget": least},
        "+ LRU": {**_NOTHING, "policy": "lru"},
        "+ policy": {**_NOTHING, "policy": "predictive"},
        "+ lookahead": {"predictor": "off", "policy": "predictive", "lookahead": "on"},
    }
    for name in PREDICTORS:
        if name in predictors:
            arms[f"+ {name}"] = {"predictor": predictors[name], "policy": "predictive", "lookahead": "on"}
    return arms


def bounds(comparison: Comparison, trace: Path, notes: Mapping[str, Any]) -> tuple[Bound, ...]:
    """What nothing can beat at the budget that the last arm under each limit had.

    Parameters
    ----------
    comparison : Comparison
        All runs done.
    trace : Path
        Routes of the same texts.
    notes : mapping
        Measurements that were recorded with it.
    """
    compute = notes.get("compute_seconds_per_step")
    if not comparison.disk or not isinstance(compute, float):
        return ()
    timing = Timing(
        bandwidth=max(speed.best for speed in comparison.disk),
        compute=compute,
        load_cost=float(notes.get("load_cost_seconds", 0.0)),
        expert_share=float(notes.get("expert_share", 0.8)),
    )
    events = load_events(Trace(trace))
    found: list[Bound] = []
    for limit in dict.fromkeys(arm.limit for arm in comparison.arms):
        budget = _budget([arm for arm in comparison.arms if arm.limit == limit and arm.ours])
        if budget is None:
            continue
        for label, policy in (("LFU", "lfu"), ("Belady", BELADY)):
            result = run_arm(events, Arm(policy=policy, budget_text=limit, budget=budget), timing)
            assert result.seconds is not None
            for words, seconds in (
                ("perfect prefetch of one layer", result.seconds.one_layer),
                ("storage never idle", result.seconds.bound),
            ):
                found.append(
                    Bound(
                        limit=limit,
                        label=f"{label}, {words}",
                        tokens_per_second=1 / seconds,
                        hit_ratio=result.hit_ratio,
                        read_bytes_per_token=result.bytes_per_token,
                    )
                )
    return tuple(found)


def _budget(arms: Sequence[ArmRecord]) -> int | None:
    """The largest budget that an arm ran with."""
    budgets = [
        run.figures.offload.budget_bytes
        for arm in arms
        for run in arm.runs
        if run.figures is not None and run.figures.offload is not None
    ]
    return max(budgets, default=None)
