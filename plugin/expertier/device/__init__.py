"""Experts in slots on a device, over host memory, over the disk."""

from expertier.device.cuda import CudaLink
from expertier.device.link import DEMOTE, DeviceEvent, DeviceLink, Fence
from expertier.device.pool import DevicePool, TierStats
from expertier.device.threads import ThreadLink
from expertier.device.tier import DeviceTier, WorkingSet

__all__ = [
    "DEMOTE",
    "CudaLink",
    "DeviceEvent",
    "DeviceLink",
    "DevicePool",
    "DeviceTier",
    "Fence",
    "ThreadLink",
    "TierStats",
    "WorkingSet",
]
