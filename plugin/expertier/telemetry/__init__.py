"""Counters and their presentation."""

from expertier.telemetry.counters import PhaseCounters, Stats

__all__ = ["PhaseCounters", "Stats"]
