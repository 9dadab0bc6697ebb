"""Virtual experts: resident experts stand in for absent ones. Lossy, so off unless asked for (SwapMoE, made soft)."""

from expertier.virtual.experts import VirtualExperts, VirtualSettings, VirtualStats
from expertier.virtual.selection import choose, close_groups, top_experts

__all__ = ["VirtualExperts", "VirtualSettings", "VirtualStats", "choose", "close_groups", "top_experts"]
