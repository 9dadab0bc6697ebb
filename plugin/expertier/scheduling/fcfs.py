"""First come, first served: the control, and what everything falls back to."""

from __future__ import annotations

import numpy as np

from expertier.residency.base import IntArray
from expertier.scheduling.base import Round


class FirstCome:
    """Leaves the order of arrival as it is."""

    name = "fcfs"

    def choose(self, now: Round) -> IntArray:
        return np.arange(min(now.room, len(now.waiting)))
