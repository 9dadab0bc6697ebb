"""A storage device and a clock that exist only as numbers."""

from __future__ import annotations

from collections import deque

from expertier.storage import DEMAND, PREFETCH, Completion, ReadRequest


class SimulatedDisk:
    """Serves reads one chunk after the other; a :class:`expertier.storage.ReadQueue`.

    Parameters
    ----------
    on_done : callable
        Completion callback of the manager.
    bandwidth : float
        Bytes per second.
    latency : float
        Seconds from a read that finds the device idle to its first byte.
    chunk_bytes : int
        A running prefetch can be overtaken at multiples of this size.

    Attributes
    ----------
    now : float
        Seconds since the beginning.
    bytes_read, prefetch_bytes_read : int
        Bytes served, and the part of it that nobody was waiting for.
    """

    def __init__(
        self,
        on_done: Completion,
        *,
        bandwidth: float,
        latency: float = 0.0,
        chunk_bytes: int = 2 << 20,
    ) -> None:
        self._on_done = on_done
        self._bandwidth = bandwidth
        self._latency = latency
        self._chunk = chunk_bytes
        self._queues: tuple[deque[ReadRequest], deque[ReadRequest]] = (deque(), deque())
        self._left: dict[int, int] = {}  # id of a request to its bytes still to come
        self._running: tuple[ReadRequest, int] | None = None  # a chunk under way
        self._free_at = 0.0  # end of that chunk
        self.now = 0.0
        self.bytes_read = 0
        self.prefetch_bytes_read = 0

    # ---- what the manager calls

    def submit(self, requests: list[ReadRequest]) -> None:
        """Queue requests in order, each at its own priority."""
        if self._running is None and requests:
            self._free_at = self.now + self._latency
        for request in requests:
            self._left[id(request)] = request.needed
            self._queues[request.priority].append(request)
        self._start()

    def promote(self, request: ReadRequest) -> None:
        """Turn a prefetch into a demand read."""
        if request.priority == PREFETCH:
            request.priority = DEMAND
            if request in self._queues[PREFETCH]:
                self._queues[PREFETCH].remove(request)
                self._queues[DEMAND].append(request)

    def cancel(self, request: ReadRequest) -> None:
        """Give up what has not begun; a chunk under way ends first."""
        if request._cancelled:
            return
        request._cancelled = True
        if request in self._queues[request.priority]:
            self._queues[request.priority].remove(request)
        if self._running is not None and self._running[0] is request:
            return
        self._finish(request, cancelled=True)

    def close(self) -> None:
        """Nothing has to be stopped."""

    # ---- time

    def advance(self, seconds: float) -> None:
        """Let time pass while somebody computes."""
        until = self.now + seconds
        while self._running is not None and self._free_at <= until:
            self._end_chunk()
        self.now = until

    def wait(self) -> None:
        """Let time pass until a read ends."""
        while self._running is not None:
            self.now = max(self.now, self._free_at)
            if self._end_chunk():
                return
        raise RuntimeError("somebody waits for the storage, and nothing was asked of it")

    def _start(self) -> None:
        queue = self._queues[DEMAND] or self._queues[PREFETCH]
        if self._running is not None or not queue:
            return
        request = queue[0]
        left = self._left[id(request)]
        count = left if left < self._chunk * 5 // 4 else self._chunk
        if count == left:
            queue.popleft()
        self._running = (request, count)
        self._free_at = max(self._free_at, self.now) + count / self._bandwidth

    def _end_chunk(self) -> bool:
        """The chunk under way has arrived; whether its request is over."""
        assert self._running is not None
        request, count = self._running
        self._running = None
        self.bytes_read += count
        if request.priority == PREFETCH:
            self.prefetch_bytes_read += count
        self._left[id(request)] -= count
        ended_at, self.now = self._free_at, max(self.now, self._free_at)
        over = not self._left[id(request)] or request._cancelled
        # The next chunk follows without a gap, before whoever is told asks for more.
        self._free_at = ended_at
        self._start()
        if over:
            self._finish(request, cancelled=bool(self._left[id(request)]))
        return over

    def _finish(self, request: ReadRequest, *, cancelled: bool) -> None:
        del self._left[id(request)]
        self._on_done(request, None, cancelled)


class OneThread:
    """Stands in for the manager's lock where there is one thread: waiting lets the device go on."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self._disk = disk

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        """Wait for whatever the manager waits for: the device is the only one that does anything."""
        self._disk.wait()

    def notify_all(self) -> None:
        """Nobody else is there."""
