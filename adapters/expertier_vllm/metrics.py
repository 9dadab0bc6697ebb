"""What workers count, as JSON and as a line in the log. Knows plain records, not vLLM.

A record is as :mod:`expertier.telemetry.metrics` takes it, and has a ``mode`` line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.budget import format_bytes
from expertier.telemetry import PhaseCounters, Stats
from expertier.telemetry.metrics import Record, read_stats


def summed(records: Iterable[Record]) -> Stats:
    """Add up the counters of all workers: each of them keeps experts of its own, or its own share of each expert."""
    total = Stats()
    for record in records:
        _add(total, read_stats(record))
    return total


def substituted_mass(records: Sequence[Record]) -> NDArray[np.float64]:
    """Gate mass that stand-ins took over all decoded tokens so far, shape ``(layers,)``; zeros where none may."""
    virtual = records[0].get("virtual")  # workers that would choose differently are refused
    if virtual is None:
        return np.zeros(1)
    mass: NDArray[np.float64] = np.array(virtual["substituted_mass"]) * max(virtual["tokens"], 1)
    return mass


def _add(total: Any, other: Any) -> None:
    for field in fields(total):
        value = getattr(other, field.name)
        if isinstance(value, PhaseCounters):
            _add(getattr(total, field.name), value)
        else:
            setattr(total, field.name, getattr(total, field.name) + value)


def report(records: Sequence[Record]) -> dict[str, Any]:
    """Answer ``GET /expertier/stats``.

    Parameters
    ----------
    records : sequence of mapping
        One per worker.

    Returns
    -------
    dict
        ``workers``: one object per worker, with ``rank``, ``mode``, all counters and their ratios, ``virtual``
        (:class:`expertier.virtual.VirtualStats`) and ``quality`` (:class:`expertier.quality.controller.QualityStats`),
        or null; ``sum``: the counters of all workers.
    """
    workers = [
        {
            "rank": record["rank"],
            "mode": record["mode"],
            **read_stats(record).as_dict(),
            "virtual": record.get("virtual"),
            "quality": record.get("quality"),
        }
        for record in sorted(records, key=lambda record: int(record["rank"]))
    ]
    return {"workers": workers, "sum": summed(records).as_dict()}


def log_line(rank: int, before: Stats, now: Stats, seconds: float) -> str:
    """Say in one line what a worker did in the last seconds.

    Parameters
    ----------
    rank : int
        The worker.
    before, now : Stats
        Its counters at the ends of the time.
    seconds : float
        How long that was.
    """
    resident = f"{format_bytes(now.resident_bytes)} of {format_bytes(now.budget_bytes)} resident"
    parts = [f"Expertier, worker {rank}: {resident} ({now.resident_experts} of {now.total_experts} experts)"]
    for name, old, new in (("decode", before.decode, now.decode), ("prefill", before.prefill, now.prefill)):
        needed = new.requests - old.requests
        if needed:
            hits = 100 * (1 - (new.misses - old.misses) / needed)
            ready = 100 * (new.ready_hits - old.ready_hits) / needed
            parts.append(f"{name} hits {hits:.1f} % (ready {ready:.1f} %)")
    waited = now.decode.stall_seconds + now.prefill.stall_seconds
    waited -= before.decode.stall_seconds + before.prefill.stall_seconds
    parts.append(f"read {format_bytes(int((now.bytes_read - before.bytes_read) / seconds))}/s")
    parts.append(f"waited {100 * waited / seconds:.0f} % of the time")
    return ", ".join(parts)
