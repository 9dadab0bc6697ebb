"""A link without a device: lanes are threads that copy memory, and the computation is whoever calls."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from expertier.device.link import LANES, Bytes, DeviceBytes, DeviceEvent, aligned_bytes, no_host_memory, whole_pages


class _Flag:
    """An event that a lane's thread sets."""

    __slots__ = ("_set", "error")

    def __init__(self, *, done: bool = False) -> None:
        self._set = threading.Event()
        self.error: BaseException | None = None
        if done:
            self._set.set()

    def done(self) -> bool:
        return self._set.is_set()

    def wait(self) -> None:
        self._set.wait()
        if self.error is not None:
            raise self.error

    def end(self, error: BaseException | None = None) -> None:
        self.error = error
        self._set.set()


_NOW = _Flag(done=True)
_Copy = tuple[DeviceBytes, DeviceBytes, Sequence[DeviceEvent], _Flag]


class ThreadLink:
    """A second room of host memory in the place of a device; implements :class:`expertier.device.DeviceLink`.

    The contract is a device's: copies run beside the computation, in order within a lane and in no order otherwise.
    A computation is over when the call that makes it returns.
    """

    name = "cpu"
    pinned = False

    def __init__(self) -> None:
        self._queues: dict[int, deque[_Copy]] = {lane: deque() for lane in LANES}
        self._wake = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"expertier-lane-{lane}", daemon=True)
            for lane in LANES
        ]
        for thread in self._threads:
            thread.start()

    def allocate(self, nbytes: int) -> DeviceBytes:
        return self.allocate_host(nbytes)

    def allocate_host(self, nbytes: int) -> Bytes:
        try:
            return aligned_bytes(nbytes, mmap.mmap(-1, max(1, whole_pages(nbytes))))
        except (OSError, ValueError, OverflowError) as error:
            raise no_host_memory(nbytes, error) from error

    def copy(
        self, target: DeviceBytes, source: DeviceBytes, lane: int, after: Sequence[DeviceEvent] = ()
    ) -> DeviceEvent:
        event = _Flag()
        with self._wake:
            self._queues[lane].append((target, source, after, event))
            self._wake.notify_all()
        return event

    def mark(self) -> DeviceEvent:
        return _NOW

    def order(self, event: DeviceEvent) -> None:
        event.wait()

    def _run(self, lane: int) -> None:
        queue = self._queues[lane]
        while True:
            with self._wake:
                while not queue:
                    if self._closed:
                        return
                    self._wake.wait()
                target, source, after, event = queue.popleft()
            try:
                for earlier in after:
                    earlier.wait()
                np.copyto(target, source)
            except BaseException as error:  # carried to whoever waits for the event
                event.end(error)
            else:
                event.end()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
