"""From raw figures to what one wants to know: medians, paired ratios, distance from the bound, identity of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Literal

from expertier.comparison.loads import LoadSummary, summarise_loads
from expertier.comparison.ratios import Ratio, median_of_known, ratio
from expertier.comparison.records import ArmRecord, ArmStatus, Comparison, Figures, QualityFigures


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm under one limit; medians over repeats unless said otherwise, ``None`` where nothing was measured.

    Attributes
    ----------
    key, label, ours, limit, limit_bytes, status, reason
        As of the arm.
    runs : int
        Successful runs.
    best_stock : bool
        Whether this is the fastest stock arm under its limit.
    tokens_per_second, tokens_per_second_low, tokens_per_second_high : float or None
        Decode speed: median, smallest and largest.
    against_stock : Ratio or None
        Decode speed over that of the fastest stock arm.
    ttft_long_seconds, ttft_short_seconds, load_seconds : float or None
        Time to the first token of the long prompt and of the short ones; loading.
    ttft_against_stock : Ratio or None
        Time to the first token of the long prompt of the stock arm that is soonest there, over this arm's: above 1
        is faster.
    peak_memory_bytes, peak_rss_bytes : int or None
        Largest over repeats.
    read_bytes_per_token : float or None
        Read from storage while decoding.
    hit_ratio, ready_hit_ratio, stall_ms_per_token : float or None
        Expertier's own figures.
    budget_bytes : int or None
        Expertier's budget.
    bound_tokens_per_second, over_bound : float or None
        What compute and storage allow for the bytes read, and decode time over the time at that bound.
    bound_by : str
        ``storage`` or ``compute``; empty without a bound.
    loads : tuple of LoadSummary
        Several requests at a time.
    lossy : bool
        As of the arm.
    quality : QualityFigures or None
        What a lossy arm lost: of the repeat with the median perplexity.
    bias, calibrated_bias : float or None
        Of virtual experts at the end of the last repeat.
    substituted : tuple of float
        Share of gate mass that stand-ins took, by layer, mean over repeats.
    """

    key: str
    label: str
    ours: bool
    limit: str
    limit_bytes: int | None
    status: ArmStatus
    reason: str
    runs: int
    best_stock: bool = False
    tokens_per_second: float | None = None
    tokens_per_second_low: float | None = None
    tokens_per_second_high: float | None = None
    against_stock: Ratio | None = None
    ttft_long_seconds: float | None = None
    ttft_short_seconds: float | None = None
    load_seconds: float | None = None
    ttft_against_stock: Ratio | None = None
    peak_memory_bytes: int | None = None
    peak_rss_bytes: int | None = None
    read_bytes_per_token: float | None = None
    hit_ratio: float | None = None
    ready_hit_ratio: float | None = None
    stall_ms_per_token: float | None = None
    budget_bytes: int | None = None
    bound_tokens_per_second: float | None = None
    over_bound: float | None = None
    bound_by: str = ""
    loads: tuple[LoadSummary, ...] = ()
    lossy: bool = False
    quality: QualityFigures | None = None
    bias: float | None = None
    calibrated_bias: float | None = None
    substituted: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whether the arms computed the same.

    Attributes
    ----------
    same_tokens : bool or None
        Whether all runs were fed the same tokens; ``None`` without two runs.
    same_logits : bool or None
        Whether every Expertier run gave logits bit by bit like the stock runs with the same kernels (or greedy tokens,
        where those are what was recorded); ``None`` if there are none to compare with.
    logits_runs : int
        Runs that took part in that check.
    agreement : float or None
        Smallest share of positions at which an Expertier run and a stock run with other kernels agree about the
        likeliest token; ``None`` if all kernels are the same.
    evidence : str
        What was compared.
    lossy_arms : int
        Arms that are not part of this because they need not compute the same.
    """

    same_tokens: bool | None
    same_logits: bool | None
    logits_runs: int
    agreement: float | None
    evidence: Literal["logits", "tokens"] = "logits"
    lossy_arms: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A comparison in short.

    Attributes
    ----------
    arms : tuple of ArmSummary
        In the order of the record.
    identity : Identity
        Whether they computed the same.
    disk_bytes_per_second : float or None
        What the storage can do: the best that was measured, or that a run reached while decoding if that is more (the
        machine may have been busier when it was measured).
    compute_seconds : float or None
        Stock's time per token without a limit.
    """

    arms: tuple[ArmSummary, ...]
    identity: Identity
    disk_bytes_per_second: float | None
    compute_seconds: float | None


def summarise(comparison: Comparison) -> Summary:
    """Work out medians, ratios, bounds and identity from the raw figures."""
    disk = _disk_speed(comparison)
    compute = _compute_seconds(comparison.arms)
    arms = []
    for arm in comparison.arms:
        rivals = [other for other in comparison.arms if other.limit == arm.limit and not other.ours]
        fastest = _best(rivals, lambda figures: figures.tokens_per_second)
        soonest = _best(rivals, lambda figures: 1 / figures.ttft_long_seconds)
        arms.append(replace(_summarise_arm(arm, fastest, soonest, disk, compute), loads=summarise_loads(arm, rivals)))
    return Summary(
        arms=tuple(arms),
        identity=replace(_identity(comparison.arms), evidence=comparison.settings.evidence),
        disk_bytes_per_second=disk,
        compute_seconds=compute,
    )


def _figures(arm: ArmRecord) -> dict[int, Figures]:
    return {run.repeat: run.figures for run in arm.runs if run.figures is not None}


def _disk_speed(comparison: Comparison) -> float | None:
    if not comparison.disk:
        return None
    reached = [
        figures.decode_read_bytes / sum(figures.token_seconds)
        for arm in comparison.arms
        for figures in _figures(arm).values()
    ]
    return max([speed.best for speed in comparison.disk] + reached)


def _compute_seconds(arms: Iterable[ArmRecord]) -> float | None:
    """Stock's time per token when nothing is scarce: the median token, so that no first touch counts."""
    medians = [
        median(second for figures in _figures(arm).values() for second in figures.token_seconds)
        for arm in arms
        if not arm.ours and arm.limit_bytes is None and _figures(arm)
    ]
    return min(medians, default=None)


def _best(arms: Sequence[ArmRecord], score: Callable[[Figures], float]) -> ArmRecord | None:
    """The arm with the highest median score."""
    scores = {arm.key: median(score(figures) for figures in _figures(arm).values()) for arm in arms if _figures(arm)}
    return max((arm for arm in arms if arm.key in scores), key=lambda arm: scores[arm.key], default=None)


def _paired(own: Mapping[int, Figures], other: ArmRecord | None) -> list[tuple[Figures, Figures]]:
    theirs = _figures(other) if other is not None else {}
    return [(own[repeat], theirs[repeat]) for repeat in sorted(own.keys() & theirs.keys())]


def _summarise_arm(
    arm: ArmRecord,
    fastest: ArmRecord | None,
    soonest: ArmRecord | None,
    disk: float | None,
    compute: float | None,
) -> ArmSummary:
    by_repeat = _figures(arm)
    figures = list(by_repeat.values())
    summary = ArmSummary(
        key=arm.key,
        label=arm.label,
        ours=arm.ours,
        limit=arm.limit,
        limit_bytes=arm.limit_bytes,
        status=arm.status,
        reason=arm.reason,
        runs=len(figures),
        lossy=arm.lossy,
        peak_memory_bytes=max((run.peak_memory_bytes for run in arm.runs if run.peak_memory_bytes), default=None),
    )
    if not figures:
        return summary
    speeds = [item.tokens_per_second for item in figures]
    speed_pairs, ttft_pairs = _paired(by_repeat, fastest), _paired(by_repeat, soonest)
    read = median(item.decode_read_bytes / len(item.token_seconds) for item in figures)
    bound, bound_by = _bound(read, disk, compute) if arm.ours else (None, "")
    offload = [item.offload for item in figures if item.offload is not None]
    return ArmSummary(
        **{
            **summary.__dict__,
            "best_stock": fastest is arm,
            "tokens_per_second": median(speeds),
            "tokens_per_second_low": min(speeds),
            "tokens_per_second_high": max(speeds),
            "against_stock": ratio([(own.tokens_per_second, other.tokens_per_second) for own, other in speed_pairs]),
            "ttft_long_seconds": median(item.ttft_long_seconds for item in figures),
            "ttft_short_seconds": median(second for item in figures for second in item.ttft_short_seconds),
            "load_seconds": median(item.load_seconds for item in figures),
            "ttft_against_stock": ratio(
                [(other.ttft_long_seconds, own.ttft_long_seconds) for own, other in ttft_pairs]
            ),
            "peak_rss_bytes": max(item.peak_rss_bytes for item in figures),
            "read_bytes_per_token": read,
            "hit_ratio": median_of_known(item.hit_ratio for item in offload),
            "ready_hit_ratio": median_of_known(item.ready_hit_ratio for item in offload),
            "stall_ms_per_token": median_of_known(item.stall_ms_per_token for item in offload),
            "budget_bytes": max((item.budget_bytes for item in offload), default=None),
            "bound_tokens_per_second": 1 / bound if bound else None,
            "over_bound": 1 / median(speeds) / bound if bound else None,
            "bound_by": bound_by,
            "quality": _median_quality(figures),
            "bias": offload[-1].bias if offload else None,
            "calibrated_bias": offload[-1].calibrated_bias if offload else None,
            "substituted": tuple(map(mean, zip(*(item.substituted for item in offload), strict=True))),
        }
    )


def _median_quality(figures: Iterable[Figures]) -> QualityFigures | None:
    found = sorted((item.quality for item in figures if item.quality is not None), key=lambda item: item.cross_entropy)
    return found[len(found) // 2] if found else None


def _bound(read: float, disk: float | None, compute: float | None) -> tuple[float | None, str]:
    """Least seconds per token: stock's compute and the reading, perfectly overlapped."""
    if disk is None or compute is None:
        return None, ""
    return max(compute, read / disk), "storage" if read / disk > compute else "compute"


def _identity(arms: Sequence[ArmRecord]) -> Identity:
    all_figures = [(arm, figures) for arm in arms for figures in _figures(arm).values()]
    tokens = {figures.tokens_digest for _, figures in all_figures}
    ours = [figures for arm, figures in all_figures if arm.ours and not arm.lossy]
    stock = [figures for arm, figures in all_figures if not arm.ours]
    comparable = [item for item in ours if any(other.kernels == item.kernels for other in stock)]
    kinds = {item.kernels for item in comparable}
    involved = [figures for arm, figures in all_figures if figures.kernels in kinds and not arm.lossy]
    digests = {(item.kernels, item.logits_digest) for item in involved}
    shares = [
        sum(one == other for one, other in zip(own.choices, theirs.choices, strict=True)) / len(own.choices)
        for own in ours
        for theirs in stock
        if own.kernels != theirs.kernels and own.choices and len(own.choices) == len(theirs.choices)
    ]
    return Identity(
        same_tokens=len(tokens) == 1 if len(all_figures) > 1 else None,
        same_logits=len(digests) == len(kinds) if comparable else None,
        logits_runs=len(involved),
        agreement=min(shares, default=None),
        lossy_arms=sum(arm.lossy and bool(_figures(arm)) for arm in arms),
    )
