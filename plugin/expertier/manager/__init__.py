"""The offload manager: who is in memory, what is read next, and what a step may compute on."""

from expertier.manager.config import ManagerConfig, Phase
from expertier.manager.lease import Lease
from expertier.manager.manager import OffloadManager

__all__ = ["Lease", "ManagerConfig", "OffloadManager", "Phase"]
