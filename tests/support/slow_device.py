"""A device that does everything as late, and in as awkward an order, as its contract allows."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.device.link import LANES
from expertier.device.threads import ThreadLink
from expertier.storage import PAGE
from support.fake_engine import LayerShape, words

COMPUTE = len(LANES)


class _Event:
    def __init__(self, link: SlowDevice) -> None:
        self._link = link
        self.past = False

    def done(self) -> bool:
        return self.past

    def wait(self) -> None:
        self._link.run_until(self)


class SlowDevice:
    """Runs nothing before it must, then whatever its dice say among what may run.

    Attributes
    ----------
    copies : int
        Copies that have run.
    """

    name = "slow"
    pinned = False

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._lock = threading.RLock()
        self._queues: dict[int, deque[tuple[Callable[[], None], Sequence[Any], _Event]]] = {
            queue: deque() for queue in (*LANES, COMPUTE)
        }
        self._memory = ThreadLink.allocate_host
        self.copies = 0
        self.closed = False

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        return np.full(nbytes, 0xEE, np.uint8)

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        memory = self._memory(self, nbytes)  # type: ignore[arg-type]
        memory[:] = 0xDD
        return memory

    def copy(self, target: Any, source: Any, lane: int, after: Sequence[Any] = ()) -> _Event:
        assert target.shape == source.shape

        def move() -> None:
            self.copies += 1
            target[:] = source

        return self._add(lane, move, after)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Give the computation something to do."""
        self._add(COMPUTE, kernel, ())

    def mark(self) -> _Event:
        return self._add(COMPUTE, lambda: None, ())

    def order(self, event: Any) -> None:
        self._add(COMPUTE, lambda: None, (event,))

    def _add(self, queue: int, action: Callable[[], None], after: Sequence[Any]) -> _Event:
        event = _Event(self)
        with self._lock:
            self._queues[queue].append((action, after, event))
        return event

    def step(self) -> bool:
        """Run one thing that may run; ``False`` if there is none."""
        with self._lock:
            ready = [queue for queue in self._queues.values() if queue and all(earlier.past for earlier in queue[0][1])]
            if not ready:
                return False
            action, _, event = self._dice.choice(ready).popleft()
            action()
            event.past = True
            return True

    def run_until(self, event: _Event) -> None:
        """Run until an event has come to pass."""
        with self._lock:
            while not event.past:
                assert self.step(), "the device waits for itself"

    def drain(self) -> None:
        """Run everything."""
        while self.step():
            pass
        assert not any(self._queues.values()), "the device waits for itself"

    def close(self) -> None:
        self.drain()
        self.closed = True


def write_packed(path: Path, shapes: dict[int, LayerShape]) -> list[LayerExperts]:
    """Write experts, each part of each on pages of its own; every word tells whose it is."""
    layers = []
    with path.open("wb") as file:
        file.write(b"\xee" * PAGE)
        for layer, shape in sorted(shapes.items()):
            parts = []
            for stage, size in enumerate(shape.parts):
                padded = -(-size // PAGE) * PAGE
                parts.append(
                    ExpertPart(
                        name=f"{layer}.{stage}",
                        layer=layer,
                        role="down" if stage else "gate_up",
                        file=path,
                        offset=file.tell(),
                        expert_bytes=size,
                        experts=shape.experts,
                        type_name="F32",
                        shape=(size // 4, 1, shape.experts),
                        padded_bytes=padded,
                    )
                )
                for expert in range(shape.experts):
                    file.write(words(layer, expert, stage, size).tobytes().ljust(padded, b"\xcc"))
            layers.append(LayerExperts(layer=layer, experts=shape.experts, top_k=shape.top_k, parts=tuple(parts)))
    return layers
