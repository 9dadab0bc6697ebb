"""Several requests at a time, in short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from expertier.comparison.ratios import Ratio, median_of_known, ratio
from expertier.comparison.records import ArmRecord, Figures, Load


@dataclass(frozen=True, kw_only=True)
class LoadSummary:
    """So many requests at a time; medians over repeats, percentiles over all requests or tokens of all repeats.

    Attributes
    ----------
    requests : int
        At a time.
    tokens_per_second : float
        Of all requests together.
    tokens_per_second_high : float
        Of the quickest repeat.
    against_stock : Ratio or None
        Over the fastest stock arm's under the same limit.
    ttft_p50, ttft_p99 : float
        Seconds to a request's first token.
    token_p50, token_p99 : float or None
        Seconds between two tokens of a request; ``None`` if each had one only.
    read_bytes_per_token : float
        Read from storage.
    hit_ratio, ready_hit_ratio, stall_ms_per_token : float or None
        Expertier's own figures.
    """

    requests: int
    tokens_per_second: float
    tokens_per_second_high: float
    against_stock: Ratio | None
    ttft_p50: float
    ttft_p99: float
    token_p50: float | None
    token_p99: float | None
    read_bytes_per_token: float
    hit_ratio: float | None
    ready_hit_ratio: float | None
    stall_ms_per_token: float | None


def summarise_loads(arm: ArmRecord, rivals: Sequence[ArmRecord]) -> tuple[LoadSummary, ...]:
    """Summarise every number of requests that an arm was measured with.

    Parameters
    ----------
    arm : ArmRecord
        The arm.
    rivals : sequence of ArmRecord
        Stock arms under the same limit.
    """
    counts = sorted({load.requests for run in arm.runs if run.figures is not None for load in run.figures.loads})
    return tuple(_summarise(count, arm, rivals) for count in counts)


def _summarise(count: int, arm: ArmRecord, rivals: Sequence[ArmRecord]) -> LoadSummary:
    own = loads_of(arm, count)
    loads = list(own.values())
    theirs = [loads_of(rival, count) for rival in rivals]
    best = max(theirs, key=lambda found: median(_speeds(found)) if found else 0.0, default={})
    ttft = [second for load in loads for second in load.ttft_seconds]
    tokens = [second for load in loads for second in load.token_seconds]
    stall = median_of_known(
        None if load.stall_seconds is None else 1e3 * load.stall_seconds / load.tokens for load in loads
    )
    return LoadSummary(
        requests=count,
        tokens_per_second=median(_speeds(own)),
        tokens_per_second_high=max(_speeds(own)),
        against_stock=ratio(
            [(own[repeat].tokens_per_second, best[repeat].tokens_per_second) for repeat in own.keys() & best.keys()]
        ),
        ttft_p50=_percentile(ttft, 50),
        ttft_p99=_percentile(ttft, 99),
        token_p50=_percentile(tokens, 50) if tokens else None,
        token_p99=_percentile(tokens, 99) if tokens else None,
        read_bytes_per_token=median(load.read_bytes / load.tokens for load in loads),
        hit_ratio=median_of_known(load.hit_ratio for load in loads),
        ready_hit_ratio=median_of_known(load.ready_hit_ratio for load in loads),
        stall_ms_per_token=stall,
    )


def loads_of(arm: ArmRecord, count: int) -> dict[int, Load]:
    """Each repeat's load with that many requests at a time."""
    return {run.repeat: load for run in arm.runs for load in _found(run.figures, count)}


def speed_with(count: int) -> Callable[[Figures], float]:
    """Make a function that reads the throughput with that many requests off figures; 0 where it was not measured."""
    return lambda figures: next((load.tokens_per_second for load in _found(figures, count)), 0.0)


def _found(figures: Figures | None, count: int) -> Iterable[Load]:
    return [] if figures is None else [load for load in figures.loads if load.requests == count]


def _speeds(loads: Mapping[int, Load]) -> list[float]:
    return [load.tokens_per_second for load in loads.values()]


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))
