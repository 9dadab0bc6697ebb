"""Who stays in memory: eviction policies and the bookkeeping of resident experts."""

from expertier.residency.base import EvictionPolicy
from expertier.residency.registry import POLICIES, make_policy

__all__ = ["POLICIES", "EvictionPolicy", "make_policy"]
