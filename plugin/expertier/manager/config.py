"""How the manager behaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, kw_only=True)
class ManagerConfig:
    """How the manager behaves.

    Attributes
    ----------
    policy : str
        Eviction policy, a key of :data:`expertier.residency.POLICIES`.
    half_life : float or None
        Half-life in tokens of a frequency policy; ``None`` is the policy's default.
    io_threads : int
        Reads in flight at a time.
    chunk_bytes : int
        Size at which a running read can be overtaken.
    quotas : mapping of int to int, or None
        Most bytes each layer may hold; layers not named share the rest of the budget freely.
    fill : bool
        Whether free room is filled with the likeliest absent experts, in the background and without evicting
        anything: from the start when all experts fit, otherwise while tokens are decoded, because a prompt that
        streams through the layers would drive them out again.
    every_layer : bool
        Whether every layer always keeps at least one token's experts, and as many more as leave room for a whole
        layer: who computes with resident experts only needs some everywhere.
    """

    policy: str = "lfu"
    half_life: float | None = None
    io_threads: int = 2
    chunk_bytes: int = 2 << 20
    quotas: Mapping[int, int] | None = None
    fill: bool = False
    every_layer: bool = False
