"""The memory experts live in, as the manager sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from expertier.residency.base import FloatArray, IntArray
from expertier.storage import StorageFile, Transfer


@dataclass(frozen=True, kw_only=True)
class PlannedRead:
    """One read that brings part of an expert into its slot.

    Attributes
    ----------
    stage : int
        Which of the expert's multiplications needs these bytes (0 is needed first).
    file : StorageFile
        Source.
    offset : int
        Absolute offset in `file`.
    view : memoryview
        Destination.
    needed : int
        Bytes that must arrive (the rest of `view` is alignment padding).
    check : callable, optional
        Looks at the bytes that arrived, in an I/O thread, and raises when they are wrong.
    prepare : callable, optional
        Makes a piece of `view` ready, in an I/O thread, right before it is read into.
    transfer : callable, optional
        Brings the bytes where no read can; as in :class:`expertier.storage.ReadRequest`.
    """

    stage: int
    file: StorageFile
    offset: int
    view: memoryview
    needed: int
    check: Callable[[memoryview], None] | None = None
    prepare: Callable[[memoryview], None] | None = None
    transfer: Transfer | None = None


class ExpertPool(Protocol):
    """Memory owned by an adapter: it knows addresses, the manager knows who lives there.

    The manager serialises all calls.
    """

    def slot_bytes(self, layer: int) -> int:
        """Memory one resident expert of `layer` occupies, padding included."""

    def stages(self, layer: int) -> int:
        """Number of stages in which an expert of `layer` arrives."""

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        """Make room for an expert and return the reads that fill it.

        Parameters
        ----------
        layer, expert : int
            The expert that comes.
        recycled : tuple of (int, int), optional
            An expert that leaves, whose memory of the same size may be taken over. It can be the coming expert
            itself when an earlier load of it was given up.

        Notes
        -----
        No reads mean that the expert is complete on return. After an exception both experts are dropped.
        """

    def drop(self, layer: int, expert: int) -> None:
        """Give the memory of an expert back to the system; harmless for one that holds none."""

    def close(self) -> None:
        """Release everything."""


KeepScores = Callable[[IntArray, int], FloatArray]
"""Called with experts (numbered over all layers) and the layer that asks for room; who scores lowest leaves first."""


@runtime_checkable
class TieredPool(ExpertPool, Protocol):
    """A pool with a tier of its own beneath, whose contents the manager's policy decides, too."""

    def rank_by(self, scores: KeepScores) -> None:
        """Take what ranks experts; it may be called only from :meth:`place` and :meth:`drop`."""
