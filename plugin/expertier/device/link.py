"""What a device tier needs of a device: memory, copies that run beside the computation, and events that order them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.errors import BudgetError
from expertier.storage import DEMAND, PAGE, PREFETCH

DEMOTE: Final = 2
"""Lane of copies from the device to the host; the other two lanes are :data:`expertier.storage.DEMAND` and
:data:`expertier.storage.PREFETCH`."""
LANES: Final = (DEMAND, PREFETCH, DEMOTE)

Bytes = NDArray[np.uint8]
DeviceBytes = Any
"""One-dimensional memory of bytes on the device: has a length, and a slice of it is such memory again."""


class DeviceEvent(Protocol):
    """A point in what the device was given to do."""

    def done(self) -> bool:
        """Whether everything before it has ended; never waits."""

    def wait(self) -> None:
        """Block the calling thread until then.

        Raises
        ------
        Exception
            What the device reports about work before it.
        """


class DeviceLink(Protocol):
    """A device and the way to it.

    Copies of one lane happen in the order in which they were issued; lanes and the computation are ordered by events
    alone. All methods may be called from any thread, :meth:`mark` and :meth:`order` from the one that computes.
    """

    name: str

    @property
    def pinned(self) -> bool:
        """Whether host memory of :meth:`allocate_host` is locked for the device's copy engines."""

    def allocate(self, nbytes: int) -> DeviceBytes:
        """Return memory on the device, never zero-filled.

        Raises
        ------
        BudgetError
            The device has no room.
        """

    def allocate_host(self, nbytes: int) -> Bytes:
        """Return page-aligned host memory from which copies to the device need no staging.

        Raises
        ------
        BudgetError
            The system refuses so much.
        """

    def copy(
        self, target: DeviceBytes | Bytes, source: DeviceBytes | Bytes, lane: int, after: Sequence[DeviceEvent] = ()
    ) -> DeviceEvent:
        """Begin a copy between host and device that starts when all of `after` have come to pass; returns at once."""

    def mark(self) -> DeviceEvent:
        """Return the point that the computation has been given so far."""

    def order(self, event: DeviceEvent) -> None:
        """Let the computation go no further before `event`; waits on the device where there is a way."""

    def close(self) -> None:
        """Wait for what runs, and give all memory back."""


class Fence:
    """What has been begun on a piece of memory and may not have ended.

    Of each lane only the latest event counts, because lanes are in order. Not locked: issuing a copy and noting it here
    are one action of the caller.
    """

    __slots__ = ("_reads", "_writes")

    def __init__(self) -> None:
        self._reads: list[DeviceEvent | None] = [None] * len(LANES)
        self._writes: list[DeviceEvent | None] = [None] * len(LANES)

    def reads(self, lane: int, event: DeviceEvent) -> None:
        """Note a copy out of the memory."""
        self._reads[lane] = event

    def writes(self, lane: int, event: DeviceEvent) -> None:
        """Note a copy into the memory."""
        self._writes[lane] = event

    def before_reading(self) -> list[DeviceEvent]:
        """What a reader has to wait for."""
        return [event for event in self._writes if event is not None and not event.done()]

    def before_writing(self) -> list[DeviceEvent]:
        """What a writer has to wait for."""
        return [event for event in (*self._writes, *self._reads) if event is not None and not event.done()]


def aligned_bytes(nbytes: int, owner: Any) -> Bytes:
    """View `owner`, memory that begins on a page, as `nbytes` bytes."""
    return np.frombuffer(owner, np.uint8, nbytes)


def whole_pages(nbytes: int) -> int:
    """Round up to pages."""
    return -(-nbytes // PAGE) * PAGE


def no_host_memory(nbytes: int, reason: object) -> BudgetError:
    """The system refuses pinned or plain host memory."""
    from expertier.budget import format_bytes

    return BudgetError(
        f"{format_bytes(nbytes)} of host memory for experts cannot be had: {reason}.",
        "Lower host_budget, or raise the memory limit (pinned memory also: ulimit -l).",
    )
