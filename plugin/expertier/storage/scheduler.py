"""I/O threads with three priorities: demand reads overtake prefetches between chunks, and both what is in no hurry."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from expertier.storage.files import StorageFile

DEMAND = 0
"""A layer is waiting, or about to wait, for these bytes."""
PREFETCH = 1
"""Nobody waits yet; runs only when no demand chunk is queued."""
BACKGROUND = 2
"""Nobody will wait, and whoever computes is not to notice: small chunks, one at a time, with a rest after each."""

_BACKGROUND_CHUNK = 512 << 10
_BACKGROUND_SHARE = 0.5  # of the time that such reads may take


Transfer = Callable[[int, int, int], None]
"""Called as ``(start, stop, priority)`` with a chunk's range and the priority of its request at that moment, in an I/O
thread and without locks; for memory that no file can be read into."""


@dataclass(eq=False)
class ReadRequest:
    """One contiguous read into memory, executed in chunks.

    Attributes
    ----------
    file : StorageFile
        Source.
    offset : int
        Absolute offset in `file`, page aligned for direct I/O.
    view : memoryview
        Destination, as long as the (padded) read.
    needed : int
        Bytes of `view` that must arrive.
    tag : object
        Handed back to the completion callback.
    priority : int
        :data:`DEMAND`, :data:`PREFETCH` or :data:`BACKGROUND`.
    check : callable, optional
        Called with the bytes that were needed when all have arrived, in an I/O thread and without locks; what it
        raises is the request's error.
    prepare : callable, optional
        Called with every chunk's memory before it is read into, in an I/O thread and without locks.
    transfer : callable, optional
        Brings a chunk into place instead of a read into `view`, which then only tells the length; see :data:`Transfer`.
    """

    file: StorageFile
    offset: int
    view: memoryview
    needed: int
    tag: Any = None
    priority: int = DEMAND
    check: Callable[[memoryview], None] | None = None
    prepare: Callable[[memoryview], None] | None = None
    transfer: Transfer | None = None
    _next: int = field(default=0, repr=False)
    _in_flight: int = field(default=0, repr=False)
    _cancelled: bool = field(default=False, repr=False)
    _error: BaseException | None = field(default=None, repr=False)


Completion = Callable[[ReadRequest, BaseException | None, bool], None]
"""Called once per request as ``(request, error, cancelled)``, from an I/O thread or :meth:`IoScheduler.cancel`."""


class ReadQueue(Protocol):
    """Brings requests in, demand first; :class:`IoScheduler` does, and so does a simulated device."""

    bytes_read: int
    prefetch_bytes_read: int

    def submit(self, requests: list[ReadRequest]) -> None:
        """Queue requests in order, each at its own priority."""

    def promote(self, request: ReadRequest) -> None:
        """Turn a prefetch into a demand read."""

    def cancel(self, request: ReadRequest) -> None:
        """Give up what has not begun; the request completes as cancelled, perhaps before this returns."""

    def close(self) -> None:
        """Stop; queued requests complete as cancelled."""


class IoScheduler:
    """Executes :class:`ReadRequest` objects on a few threads.

    Parameters
    ----------
    on_done : callable
        Completion callback; runs without internal locks held.
    threads : int
        Reads in flight at a time.
    chunk_bytes : int
        A running read can be overtaken at multiples of this size. One expert's chunks are shared among the
        threads, so that its first stage arrives as early as the device allows.
    """

    def __init__(self, on_done: Completion, *, threads: int = 2, chunk_bytes: int = 2 << 20) -> None:
        self._on_done = on_done
        self._chunk = chunk_bytes
        self._queues: tuple[deque[ReadRequest], ...] = (deque(), deque(), deque())
        self._background = False  # whether a chunk in the background is in flight
        self._rest_until = 0.0
        self._wake = threading.Condition()
        self._closed = False
        self.bytes_read = 0
        self.prefetch_bytes_read = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"expertier-io-{index}", daemon=True) for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: list[ReadRequest]) -> None:
        """Queue requests in order, each at its own priority."""
        with self._wake:
            if self._closed:
                raise RuntimeError("the I/O scheduler is closed")
            for request in requests:
                self._queues[request.priority].append(request)
            self._wake.notify_all()  # also for a single request: threads share its chunks

    def promote(self, request: ReadRequest) -> None:
        """Turn a read that nobody waited for into a demand read; its remaining chunks overtake all others."""
        with self._wake:
            if request.priority != DEMAND:
                queue, request.priority = self._queues[request.priority], DEMAND
                try:
                    queue.remove(request)
                except ValueError:
                    return  # every chunk is already in flight
                self._queues[DEMAND].append(request)
                self._wake.notify_all()  # those who rest between chunks in the background, too

    def cancel(self, request: ReadRequest) -> None:
        """Give up the chunks not yet started; completion follows when those in flight have ended."""
        with self._wake:
            if request._cancelled:
                return
            request._cancelled = True
            try:
                self._queues[request.priority].remove(request)
            except ValueError:
                return  # every chunk was handed out: the last one in flight completes the request
            if request._in_flight:
                return
        self._on_done(request, None, True)

    def _next_queue(self) -> deque[ReadRequest] | None:
        """Where the next chunk is to come from; the lock is held."""
        for queue in self._queues[:BACKGROUND]:
            if queue:
                return queue
        quiet = not self._background and time.monotonic() >= self._rest_until
        return self._queues[BACKGROUND] if quiet and self._queues[BACKGROUND] else None

    def _patience(self) -> float | None:
        """How long to wait for something to do, in seconds; the lock is held."""
        if self._background or not self._queues[BACKGROUND]:
            return None
        return max(0.0, self._rest_until - time.monotonic())

    def _run(self) -> None:
        while True:
            with self._wake:
                while (queue := self._next_queue()) is None:
                    if self._closed:
                        return
                    self._wake.wait(self._patience())
                request = queue[0]
                background = request.priority == BACKGROUND
                chunk_bytes = min(self._chunk, _BACKGROUND_CHUNK) if background else self._chunk
                start = request._next
                stop = min(start + chunk_bytes, len(request.view))
                if len(request.view) - stop < chunk_bytes // 4:
                    stop = len(request.view)  # no tiny tail chunks
                request._next = stop
                request._in_flight += 1
                self._background |= background
                if stop == len(request.view):
                    queue.popleft()
            began = time.monotonic()
            error: BaseException | None = None
            try:
                if request.transfer is not None:
                    request.transfer(start, stop, request.priority)
                else:
                    chunk = request.view[start:stop]
                    if request.prepare is not None:
                        request.prepare(chunk)
                    request.file.read_into(chunk, request.offset + start, min(stop, request.needed) - start)
            except BaseException as caught:  # carried to whoever waits for this expert
                error = caught
            with self._wake:
                if background:
                    now = time.monotonic()
                    self._background, self._rest_until = False, now + (now - began) * (1 / _BACKGROUND_SHARE - 1)
                    self._wake.notify_all()
                request._in_flight -= 1
                if error is None:
                    self.bytes_read += stop - start
                    if request.priority != DEMAND:
                        self.prefetch_bytes_read += stop - start
                elif request._error is None:
                    request._error = error
                    if request._next < len(request.view) and not request._cancelled:
                        self._queues[request.priority].remove(request)
                        request._next = len(request.view)
                finished = request._in_flight == 0 and (request._next == len(request.view) or request._cancelled)
                cancelled = request._cancelled and request._next < len(request.view)
            if finished:
                if request.check is not None and request._error is None and not request._cancelled:
                    try:
                        request.check(request.view[: request.needed])
                    except BaseException as caught:
                        request._error = caught
                self._on_done(request, request._error, cancelled)

    def close(self) -> None:
        """Stop the threads after the chunks in flight; queued requests complete as cancelled."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            pending = [request for queue in self._queues for request in queue]
            self._wake.notify_all()
        for request in pending:
            self.cancel(request)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
