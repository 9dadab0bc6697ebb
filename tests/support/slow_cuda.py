"""Those names of torch that ``CudaLink`` uses, over a device that does everything as late as its contract allows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.slow_device import COMPUTE, SlowDevice


class SlowTorch:
    """Stands in ``sys.modules`` for torch.

    Parameters
    ----------
    device : SlowDevice
        Runs what streams are given.
    room : int
        Bytes that the device has.
    refused : int
        What registering host memory answers; 0 is success.

    Attributes
    ----------
    registered : dict of int to int
        Host memory that copy engines may use: address to size.
    """

    uint8 = "uint8"
    OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})

    def __init__(self, device: SlowDevice, *, room: int = 1 << 30, refused: int = 0) -> None:
        import torch

        self.slow = device
        self.device = torch.device
        self.cuda = self
        self.registered: dict[int, int] = {}
        self._room, self._refused = room, refused
        self._streams = 0
        self._current = threading.local()

    # ---- torch

    def empty(self, nbytes: int, *, dtype: str, device: Any) -> _Memory:
        assert dtype == self.uint8 and device.type == "cuda"
        if nbytes > self._room:
            raise self.OutOfMemoryError
        return _Memory(self, self.slow.allocate(nbytes))

    def from_numpy(self, memory: NDArray[np.uint8]) -> _Memory:
        start, stop = memory.ctypes.data, memory.ctypes.data + len(memory)
        held = (begin <= start and stop <= begin + size for begin, size in self.registered.items())
        assert any(held), "a copy engine was given memory that is not registered"
        return _Memory(self, memory)

    def inference_mode(self, mode: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    # ---- torch.cuda

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any) -> str:
        return "slow"

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self._room, self._room

    def synchronize(self, device: Any) -> None:
        self.slow.drain()

    def Stream(self, device: Any, priority: int = 0) -> _Stream:  # noqa: N802
        self._streams += 1
        return _Stream(self.slow, self._streams - 1)

    def Event(self) -> _Event:  # noqa: N802
        return _Event(self.slow)

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        self._current.stream = stream
        yield
        del self._current.stream

    def current_stream(self, device: Any = None) -> _Stream:
        return getattr(self._current, "stream", None) or _Stream(self.slow, COMPUTE)

    def cudart(self) -> SlowTorch:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.registered[address] = size
        return self._refused

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


class _Stream:
    def __init__(self, slow: SlowDevice, queue: int) -> None:
        self._slow, self.queue = slow, queue

    def wait_event(self, event: _Event) -> None:
        self._slow._add(self.queue, lambda: None, (event.point,))

    def synchronize(self) -> None:
        self._slow.run_until(self._slow._add(self.queue, lambda: None, ()))


class _Event:
    point: Any

    def __init__(self, slow: SlowDevice) -> None:
        self._slow = slow

    def record(self, stream: _Stream) -> None:
        self.point = self._slow._add(stream.queue, lambda: None, ())

    def query(self) -> bool:
        return bool(self.point.past)

    def synchronize(self) -> None:
        self._slow.run_until(self.point)


class _Memory:
    def __init__(self, torch: SlowTorch, values: NDArray[np.uint8]) -> None:
        self._torch, self.values = torch, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: slice) -> _Memory:
        return _Memory(self._torch, self.values[place])

    def __bytes__(self) -> bytes:
        return self.values.tobytes()

    def copy_(self, source: _Memory, *, non_blocking: bool) -> None:
        assert non_blocking and len(self) == len(source)

        def move() -> None:
            self.values[:] = source.values

        self._torch.slow._add(self._torch.current_stream().queue, move, ())
