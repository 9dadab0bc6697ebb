"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable

from expertier.errors import UnsupportedOptionError
from expertier.residency.base import EvictionPolicy, ExpertSpace
from expertier.residency.edge import Edge
from expertier.residency.lfru import LFRU
from expertier.residency.lfu import LFU
from expertier.residency.lru import LRU
from expertier.residency.predictive import Predictive

POLICIES: dict[str, Callable[[ExpertSpace], EvictionPolicy]] = {
    "lru": LRU,
    "lfu": LFU,
    "lfru": LFRU,
    "edge": Edge,
    "predictive": Predictive,
}
WITH_HALF_LIFE: dict[str, Callable[[ExpertSpace, float], EvictionPolicy]] = {
    "lfu": LFU,
    "lfru": LFRU,
    "predictive": Predictive,
}


def make_policy(name: str, space: ExpertSpace, *, half_life: float | None = None) -> EvictionPolicy:
    """Build the policy called `name`.

    Parameters
    ----------
    name : str
        A key of :data:`POLICIES`.
    space : ExpertSpace
        The model's experts.
    half_life : float, optional
        Half-life in tokens of the policies that have one (``lfu``, ``lfru``, ``predictive``); ``None`` is each
        policy's own default.

    Raises
    ------
    UnsupportedOptionError
        For an unknown name, or a half-life for a policy without one.
    """
    if name not in POLICIES:
        raise UnsupportedOptionError(f"There is no eviction policy {name!r}.", f"Choose from: {', '.join(POLICIES)}.")
    if half_life is None:
        return POLICIES[name](space)
    if name in WITH_HALF_LIFE:
        return WITH_HALF_LIFE[name](space, half_life)
    raise UnsupportedOptionError(f"The eviction policy {name!r} has no half-life.", "Leave half_life unset.")
