"""The host tier: slots of (pinned) memory between the disk and the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from expertier.device.link import Bytes, Fence
from expertier.residency.base import FloatArray, IntArray


class HostArena:
    """Which expert is in which slot of host memory. Not locked; the pool that owns it is.

    Parameters
    ----------
    memory : ndarray of uint8
        As long as all slots.
    slot_bytes : int
        Size of a slot, a multiple of the page size.
    experts : int
        Experts of the model, numbered over all layers.

    Attributes
    ----------
    slot_of : ndarray of int64, shape (experts,)
        Slot of every expert, -1 for none.
    complete : ndarray of bool, shape (slots,)
        Whether all bytes of the slot's expert are in it, or on their way there from the device.
    claimed : ndarray of bool, shape (slots,)
        Whether a load reads from or writes to the slot and has not ended.
    fences : list of Fence
        One for each slot.
    """

    def __init__(self, memory: Bytes, slot_bytes: int, experts: int) -> None:
        slots = len(memory) // slot_bytes
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._holder = np.full(slots, -1, np.int64)
        self._free = list(range(slots))[::-1]
        self.slot_of = np.full(experts, -1, np.int64)
        self.complete = np.zeros(slots, bool)
        self.claimed = np.zeros(slots, bool)
        self.fences = [Fence() for _ in range(slots)]

    def __len__(self) -> int:
        return len(self._holder)

    @property
    def held(self) -> int:
        """Slots with an expert."""
        return len(self._holder) - len(self._free)

    def holds(self, expert: int) -> bool:
        """Whether all bytes of an expert are here."""
        slot = self.slot_of[expert]
        return bool(slot >= 0 and self.complete[slot])

    def bytes_at(self, slot: int, start: int, stop: int) -> Bytes:
        """Bytes of a slot."""
        base = slot * self._slot_bytes
        return self._memory[base + start : base + stop]

    def take_free(self, expert: int) -> int:
        """Give an expert a slot that nobody holds; -1 if there is none."""
        if not self._free:
            return -1
        slot = self._free.pop()
        self._give(slot, expert)
        return slot

    def take(self, expert: int, doubled: NDArray[np.bool_], scores: Callable[[IntArray], FloatArray]) -> int:
        """Give an expert that leaves the device a slot, unless all that are held are worth more; -1 then.

        Who is on the device as well leaves first, the one that will stay there longest before all; then the one that is
        least worth keeping.

        Parameters
        ----------
        expert : int
            The expert.
        doubled : ndarray of bool, shape (experts,)
            Experts that are on the device.
        scores : callable
            What experts are worth.
        """
        if (slot := self.take_free(expert)) >= 0:
            return slot
        candidates = np.flatnonzero(self.complete & ~self.claimed)
        if not candidates.size:
            return -1
        holders = self._holder[candidates]
        worth = scores(np.append(holders, expert))
        both = doubled[holders]
        if both.any():
            slot = int(candidates[np.where(both, worth[:-1], -np.inf).argmax()])
        elif worth[:-1].min() < worth[-1]:
            slot = int(candidates[worth[:-1].argmin()])
        else:
            return -1
        self.slot_of[self._holder[slot]] = -1
        self._give(slot, expert)
        return slot

    def _give(self, slot: int, expert: int) -> None:
        self._holder[slot] = expert
        self.slot_of[expert] = slot
        self.complete[slot] = False

    def give_up(self, expert: int) -> None:
        """Free the slot of an expert whose bytes did not all arrive."""
        slot = int(self.slot_of[expert])
        self.slot_of[expert] = self._holder[slot] = -1
        self.complete[slot] = self.claimed[slot] = False
        self._free.append(slot)

    def doubles(self, doubled: NDArray[np.bool_]) -> int:
        """Slots whose expert is on the device, too."""
        holders = self._holder[self.complete]
        return int(doubled[holders].sum())
