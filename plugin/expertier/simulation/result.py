"""What a replay counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertier.residency.base import IntArray
from expertier.simulation.events import Events


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One pass of a trace through a pool.

    Attributes
    ----------
    policy : str
        Who was evicted.
    budget : int
        Bytes of the pool.
    tokens, steps : int
        Decoded tokens and decode steps.
    requests, hits : int
        Experts that decode steps needed, once per layer and step, and those that were resident.
    misses : ndarray of int64, shape (events,)
        Loads of every event, of prompts, too.
    bytes_read : ndarray of int64, shape (events,)
        Bytes of these.
    """

    policy: str
    budget: int
    tokens: int
    steps: int
    requests: int
    hits: int
    misses: IntArray
    bytes_read: IntArray

    @classmethod
    def of(cls, events: Events, *, policy: str, budget: int, misses: IntArray, bytes_read: IntArray) -> Replay:
        """Sum up what happened event by event."""
        requests = int(np.diff(events.set_starts)[events.decode].sum())
        return cls(
            policy=policy,
            budget=budget,
            tokens=events.decode_tokens,
            steps=events.decode_steps,
            requests=requests,
            hits=requests - int(misses[events.decode].sum()),
            misses=misses,
            bytes_read=bytes_read,
        )

    @property
    def hit_ratio(self) -> float:
        """Share of needed experts that were resident, in decode steps."""
        return self.hits / self.requests

    def loads_per_token(self) -> float:
        """Loads of decode steps per token."""
        return (self.requests - self.hits) / self.tokens

    def bytes_per_token(self, events: Events) -> float:
        """Bytes read in decode steps per token."""
        return float(self.bytes_read[events.decode].sum()) / self.tokens
