"""Counters as Prometheus samples, the same names for every engine.

A record is what a process that computes tells about itself: the fields of :class:`expertier.telemetry.Stats` as plain
data, its ``rank``, and what was lost (:func:`expertier.quality.serving.describe_losses`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal

from expertier.telemetry.counters import PhaseCounters, Stats

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Record = Mapping[str, Any]
PREFIX: Final = "expertier_"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, kw_only=True)
class _Definition:
    """One metric: its name after :data:`PREFIX`, and how to read it off a worker's counters (or off a phase's)."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    read: Callable[[Any], float]
    by_phase: bool = False


def _plain(name: str, field: str, kind: Literal["counter", "gauge"], text: str) -> _Definition:
    return _Definition(name=name, kind=kind, text=text, read=lambda stats: float(getattr(stats, field)))


def _phase(name: str, read: Callable[[PhaseCounters], float], text: str) -> _Definition:
    return _Definition(name=name, kind="counter", text=text, read=read, by_phase=True)


# The Prometheus client appends _total to the names of counters.
_DEFINITIONS: Final = (
    _plain("budget_bytes", "budget_bytes", "gauge", "Memory for experts."),
    _plain("resident_bytes", "resident_bytes", "gauge", "Memory that experts hold now, loads under way included."),
    _plain("peak_resident_bytes", "peak_resident_bytes", "gauge", "The most memory that experts ever held."),
    _plain("model_expert_bytes", "total_bytes", "gauge", "Memory that all experts of the model would take."),
    _plain("resident_experts", "resident_experts", "gauge", "Experts in memory now."),
    _plain("model_experts", "total_experts", "gauge", "Experts of the model."),
    _plain("bytes_read", "bytes_read", "counter", "Bytes read from storage."),
    _plain("prefetch_bytes_read", "prefetch_bytes_read", "counter", "Bytes read from storage ahead of need."),
    _plain("evictions", "evictions", "counter", "Experts that lost their memory."),
    _plain("prefetches", "prefetches", "counter", "Loads begun ahead of need."),
    _plain("prefetches_used", "prefetches_used", "counter", "Loads begun ahead of need that were needed."),
    _plain("load_seconds", "load_seconds", "counter", "Time from queueing a load to its last byte, summed over loads."),
    _phase("steps", lambda phase: phase.steps, "Forward passes."),
    _phase("tokens", lambda phase: phase.tokens, "Tokens in forward passes."),
    _phase(
        "hits",
        lambda phase: phase.ready_hits + phase.late,
        "Experts that were resident or whose load was under way when needed, counted once per layer and step.",
    ),
    _phase("ready_hits", lambda phase: phase.ready_hits, "Experts that were resident when needed."),
    _phase("misses", lambda phase: phase.misses, "Experts whose load began when they were needed."),
    _phase("stall_seconds", lambda phase: phase.stall_seconds, "Time compute waited for experts."),
)


def read_stats(record: Record) -> Stats:
    """Build the counters back from a worker's record.

    Raises
    ------
    TypeError
        It has no counters.
    """
    given = {field.name: record[field.name] for field in fields(Stats) if field.name in record}
    known = {field.name for field in fields(PhaseCounters)}
    for name in ("decode", "prefill"):
        given[name] = PhaseCounters(**{key: value for key, value in given.get(name, {}).items() if key in known})
    return Stats(**given)


# What stand-ins and their budget tell (expertier.virtual.VirtualStats, expertier.quality.controller.QualityStats): of
# which record, key, name, kind, by layer, text.
_LOSSES: Final = (
    ("virtual", "bias", "virtual_bias", "gauge", False, "What residency is worth, as a share of gate weight."),
    ("virtual", "tokens", "virtual_tokens", "counter", False, "Tokens that may have been given stand-ins."),
    ("virtual", "exact_tokens", "virtual_exact_tokens", "counter", False, "Tokens that were computed without."),
    ("virtual", "substituted_share", "substituted_share", "gauge", True, "Share of choices that were replaced."),
    ("virtual", "substituted_mass", "substituted_mass", "gauge", True, "Mean gate weight of what was replaced."),
    ("quality", "calibrated_bias", "quality_calibrated_bias", "gauge", False, "The largest bias the profile covers."),
    ("quality", "allowed", "quality_allowed", "gauge", False, "Relative increase of the perplexity that is allowed."),
    ("quality", "estimated", "quality_estimated", "gauge", False, "What stand-ins cost now, by the proxy."),
    ("quality", "spent", "quality_spent", "gauge", False, "What they have cost since the start, by the proxy."),
    ("quality", "back_offs", "quality_back_offs", "counter", False, "How often the bias went down."),
)


def collect(records: Iterable[Record]) -> Iterator[Metric]:
    """Yield all metrics in the form the Prometheus client takes, labelled by the worker's rank.

    Parameters
    ----------
    records : iterable of mapping
        One per worker.
    """
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    records = list(records)
    workers = [(str(record["rank"]), read_stats(record)) for record in records]
    for definition in _DEFINITIONS:
        labels = ("rank", "phase") if definition.by_phase else ("rank",)
        kind = GaugeMetricFamily if definition.kind == "gauge" else CounterMetricFamily
        family = kind(PREFIX + definition.name, definition.text, labels=labels)
        for rank, stats in workers:
            if definition.by_phase:
                family.add_metric((rank, "decode"), definition.read(stats.decode))
                family.add_metric((rank, "prefill"), definition.read(stats.prefill))
            else:
                family.add_metric((rank,), definition.read(stats))
        yield family
    for source, key, name, form, by_layer, text in _LOSSES:
        told = [(str(record["rank"]), record[source]) for record in records if record.get(source)]
        if not told:
            continue
        kind = GaugeMetricFamily if form == "gauge" else CounterMetricFamily
        family = kind(PREFIX + name, text, labels=("rank", "layer") if by_layer else ("rank",))
        for rank, losses in told:
            if not by_layer:
                family.add_metric((rank,), _number(losses[key]))
                continue
            for layer, value in zip(losses["layers"], losses[key], strict=True):
                family.add_metric((rank, str(layer)), _number(value))
        yield family


def _number(value: float | None) -> float:
    """A figure of a record, where infinity is ``None``: JSON has none."""
    return math.inf if value is None else float(value)


class Collector:
    """Fulfils the collector protocol of the Prometheus client.

    Parameters
    ----------
    read : callable
        Gives the workers' records; called for every scrape.
    """

    def __init__(self, read: Callable[[], Sequence[Record]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; none while no worker has told anything yet."""
        records = self._read()
        if records:
            yield from collect(records)

    def describe(self) -> list[Metric]:
        """Say nothing about names: registering must not wait for a worker."""
        return []


def expose(records: Sequence[Record]) -> bytes:
    """Write all metrics in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(Collector(lambda: records))
    return generate_latest(registry)
