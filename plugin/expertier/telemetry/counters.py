"""What the offload manager counts. Plain numbers; exporters turn them into metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class PhaseCounters:
    """Counters of one phase (decode or prefill).

    Attributes
    ----------
    steps, tokens : int
        Forward passes and tokens in them.
    ready_hits : int
        Experts that were resident when needed.
    late : int
        Experts whose load was under way when needed.
    misses : int
        Experts whose load began when they were needed.
    stall_seconds : float
        Time compute waited for experts.
    """

    steps: int = 0
    tokens: int = 0
    ready_hits: int = 0
    late: int = 0
    misses: int = 0
    stall_seconds: float = 0.0

    def since(self, before: PhaseCounters) -> PhaseCounters:
        """Return what was counted after `before`."""
        return PhaseCounters(
            **{item.name: getattr(self, item.name) - getattr(before, item.name) for item in fields(self)}
        )

    @property
    def requests(self) -> int:
        """Experts needed, counted once per layer and step."""
        return self.ready_hits + self.late + self.misses

    @property
    def hit_ratio(self) -> float:
        """Share of needed experts that were resident or under way; ``nan`` before the first."""
        return (self.ready_hits + self.late) / self.requests if self.requests else float("nan")

    @property
    def ready_hit_ratio(self) -> float:
        """Share of needed experts that were there without waiting; ``nan`` before the first."""
        return self.ready_hits / self.requests if self.requests else float("nan")


@dataclass
class Stats:
    """A snapshot of the manager.

    Attributes
    ----------
    budget_bytes, resident_bytes, peak_resident_bytes : int
        The limit, what is held now and the most that was ever held (loads under way included).
    total_bytes : int
        What all experts of the model would take.
    resident_experts, total_experts : int
        The same in experts.
    bytes_read, prefetch_bytes_read : int
        Read from storage in total, and the part of it that was read ahead.
    evictions : int
        Experts that lost their memory.
    prefetches, prefetches_used, prefetches_cancelled, prefetches_declined : int
        Loads begun ahead of need; those needed afterwards; those given up half-way; those not begun because the
        victim was likelier to be used.
    swaps : int
        Loads begun in the background in place of an expert less likely to be used.
    load_seconds : float
        Sum over experts of the time from queueing a load to its last byte.
    decode, prefill : PhaseCounters
        The same questions by phase.
    """

    budget_bytes: int = 0
    resident_bytes: int = 0
    peak_resident_bytes: int = 0
    total_bytes: int = 0
    resident_experts: int = 0
    total_experts: int = 0
    bytes_read: int = 0
    prefetch_bytes_read: int = 0
    evictions: int = 0
    prefetches: int = 0
    prefetches_used: int = 0
    prefetches_cancelled: int = 0
    prefetches_declined: int = 0
    swaps: int = 0
    load_seconds: float = 0.0
    decode: PhaseCounters = field(default_factory=PhaseCounters)
    prefill: PhaseCounters = field(default_factory=PhaseCounters)

    def as_dict(self) -> dict[str, Any]:
        """Return nested plain data with the ratios included, ready for JSON."""
        data = asdict(self)
        for name in ("decode", "prefill"):
            phase: PhaseCounters = getattr(self, name)
            data[name]["requests"] = phase.requests
            data[name]["hit_ratio"] = phase.hit_ratio if phase.requests else None
            data[name]["ready_hit_ratio"] = phase.ready_hit_ratio if phase.requests else None
        return data
