"""The link to a CUDA device, through torch."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from expertier.budget import format_bytes
from expertier.device.link import (
    Bytes,
    DeviceBytes,
    DeviceEvent,
    aligned_bytes,
    no_host_memory,
    whole_pages,
)
from expertier.errors import BudgetError, UnsupportedEngineError
from expertier.storage import DEMAND, PREFETCH


class _CudaEvent:
    """A ``torch.cuda.Event`` under the names of :class:`expertier.device.DeviceEvent`."""

    __slots__ = ("native",)

    def __init__(self, native: Any) -> None:
        self.native = native

    def done(self) -> bool:
        return bool(self.native.query())

    def wait(self) -> None:
        self.native.synchronize()


class CudaLink:
    """Streams, events and pinned memory of a CUDA device; implements :class:`expertier.device.DeviceLink`.

    Parameters
    ----------
    device : str or int or torch.device
        Which one; computations are those of its current stream in the calling thread.

    Raises
    ------
    UnsupportedEngineError
        There is no torch, or torch sees no such device.

    Notes
    -----
    Every lane is a stream. Demand loads have one of higher priority, but as CUDA documents, priorities decide between
    kernels only and not between copies: what lets demand overtake is that the tier keeps few bytes of a prefetch under
    way. Lanes are apart so that a copy which waits for a kernel does not hold up those behind it.

    Host memory is mapped by us and registered (``cudaHostRegister``): torch's own pinned allocator rounds sizes up to
    powers of two, and direct reads need page alignment.
    """

    pinned = True

    def __init__(self, device: Any = "cuda") -> None:
        try:
            import torch
        except ImportError as error:
            raise UnsupportedEngineError(
                "A CUDA device tier needs torch.", "Install it: pip install 'expertier[train]'."
            ) from error
        self._torch = torch
        wanted = torch.device(device)
        if not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count():
            raise UnsupportedEngineError(
                f"torch sees no device {wanted}.", "Check the driver, or use the device 'cpu'."
            )
        self.device = torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)
        self.name = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        self._streams = {
            DEMAND: torch.cuda.Stream(self.device, priority=-1),
            PREFETCH: torch.cuda.Stream(self.device),
        }
        self._back = torch.cuda.Stream(self.device)
        self._registered: list[Bytes] = []

    def allocate(self, nbytes: int) -> DeviceBytes:
        try:
            with self._torch.inference_mode(False):  # other threads could not write into an inference tensor
                memory = self._torch.empty(nbytes, dtype=self._torch.uint8, device=self.device)
            # What was freed may be handed out again while the computation still reads it, and copies do not wait for
            # that.
            self._torch.cuda.current_stream(self.device).synchronize()
            return memory
        except self._torch.cuda.OutOfMemoryError as error:
            free, _ = self._torch.cuda.mem_get_info(self.device)
            raise BudgetError(
                f"{self.device} has no room for {format_bytes(nbytes)} of experts ({format_bytes(free)} are free).",
                "Lower the budget.",
            ) from error

    def allocate_host(self, nbytes: int) -> Bytes:
        size = whole_pages(max(1, nbytes))
        try:
            memory = aligned_bytes(nbytes, mmap.mmap(-1, size))
        except (OSError, ValueError, OverflowError) as error:
            raise no_host_memory(nbytes, error) from error
        runtime = self._torch.cuda.cudart()
        with self._torch.cuda.device(self.device):
            code = int(runtime.cudaHostRegister(memory.ctypes.data, size, 0))
        if code:
            raise no_host_memory(nbytes, f"cudaHostRegister failed with code {code}")
        self._registered.append(memory)
        return memory

    def copy(
        self, target: DeviceBytes | Bytes, source: DeviceBytes | Bytes, lane: int, after: Sequence[DeviceEvent] = ()
    ) -> DeviceEvent:
        stream = self._streams.get(lane, self._back)
        for event in after:
            stream.wait_event(event.native)  # type: ignore[attr-defined]
        with self._torch.cuda.stream(stream):
            self._tensor(target).copy_(self._tensor(source), non_blocking=True)
        return self._record(stream)

    def _tensor(self, memory: DeviceBytes | Bytes) -> Any:
        return self._torch.from_numpy(memory) if isinstance(memory, np.ndarray) else memory

    def _record(self, stream: Any) -> DeviceEvent:
        native = self._torch.cuda.Event()
        native.record(stream)
        return _CudaEvent(native)

    def mark(self) -> DeviceEvent:
        return self._record(self._torch.cuda.current_stream(self.device))

    def order(self, event: DeviceEvent) -> None:
        self._torch.cuda.current_stream(self.device).wait_event(event.native)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._torch.cuda.synchronize(self.device)
        runtime = self._torch.cuda.cudart()
        while self._registered:
            runtime.cudaHostUnregister(self._registered.pop().ctypes.data)
