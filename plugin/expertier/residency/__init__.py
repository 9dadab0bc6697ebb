"""Who stays in memory: eviction policies and the bookkeeping of resident experts."""

from expertier.residency.base import EvictionPolicy
from expertier.residency.registry import POLICIES, WITH_HALF_LIFE, make_policy

__all__ = ["POLICIES", "WITH_HALF_LIFE", "EvictionPolicy", "make_policy"]
