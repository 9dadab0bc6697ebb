"""An engine without an engine: expert files, expert memory and a 'computation' that recognises every expert's bytes.

Every eight-byte word of a model file says which layer, expert and stage it belongs to and where in the part it lies, so
that a computation on an absent, half-loaded or foreign expert cannot go unnoticed.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.errors import ExpertLoadError
from expertier.manager import ManagerConfig, OffloadManager
from expertier.residency.pool import PlannedRead
from expertier.storage import PAGE, IoMode, StorageFile

HEADER = 520  # the first tensor does not start on a page
POISON = 0xFFFFFFFFFFFFFFFF
WATCHDOG = 30.0
"""Seconds after which something that should have happened is declared lost. It judges hangs, not speed."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Experts of one layer; `parts` are the bytes of each of an expert's parts, multiples of eight."""

    experts: int
    top_k: int
    parts: tuple[int, ...] = (PAGE, PAGE)

    @property
    def slot_bytes(self) -> int:
        """Every part on pages of its own, with room for a start off the page boundary."""
        return sum(_pages(part) + PAGE for part in self.parts)


Shapes = Mapping[int, LayerShape]


def uniform(layers: int, experts: int, top_k: int = 2, parts: tuple[int, ...] = (PAGE, PAGE)) -> dict[int, LayerShape]:
    """Layers 0..L-1 of one shape."""
    return {layer: LayerShape(experts=experts, top_k=top_k, parts=parts) for layer in range(layers)}


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def words(layer: int, expert: int, stage: int, size: int) -> NDArray[np.uint64]:
    """What a part of an expert contains."""
    start = (layer << 48) | (expert << 36) | (stage << 32)
    return np.arange(start, start + size // 8, dtype=np.uint64)


def write_model(path: Path, shapes: Shapes) -> dict[tuple[int, int], int]:
    """Write tensors one after the other, each with the rows of all experts; return the offset of each."""
    offsets = {}
    with path.open("wb") as file:
        file.write(b"\xee" * HEADER)
        for layer, shape in sorted(shapes.items()):
            for stage, size in enumerate(shape.parts):
                offsets[layer, stage] = file.tell()
                for expert in range(shape.experts):
                    file.write(words(layer, expert, stage, size).tobytes())
    return offsets


class ScriptedFile(StorageFile):
    """A real file whose reads can be held back, made short, or made to fail.

    Attributes
    ----------
    reads : list of (int, int)
        Offset and length of every read, in the order in which they began.
    most_bytes : int or None
        Most bytes one system call returns.
    """

    def __init__(self, path: Path, mode: IoMode = "auto") -> None:
        super().__init__(path, mode)
        self.reads: list[tuple[int, int]] = []
        self.most_bytes: int | None = None
        self._change = threading.Condition()
        self._held = (0, 0)
        self._passes = 0
        self._inside = 0
        self._failing: list[tuple[int, int, list[int]]] = []

    def hold(self, offset: int = 0, size: int = 1 << 60) -> None:
        """From now on reads that touch this range, and no others, stop before their first byte."""
        with self._change:
            self._held = (offset, offset + size)
            self._passes = 0
            self._change.notify_all()

    def let(self, count: int) -> None:
        """Let some of the reads held back pass."""
        with self._change:
            self._passes += count
            self._change.notify_all()

    def let_all(self) -> None:
        """Reads run freely again."""
        with self._change:
            self._held = (0, 0)
            self._change.notify_all()

    def await_held(self, count: int) -> None:
        """Wait until this many reads are held back."""
        with self._change:
            assert self._change.wait_for(lambda: self._inside >= count, WATCHDOG), f"{self._inside} reads began"

    def fail(self, offset: int, size: int, times: int = 1 << 30) -> None:
        """Reads that touch this range report an I/O error, `times` times."""
        with self._change:
            self._failing.append((offset, offset + size, [times]))

    def heal(self) -> None:
        """No more errors."""
        with self._change:
            self._failing.clear()

    def read_into(self, view: memoryview, offset: int, needed: int) -> None:
        def free() -> bool:
            start, stop = self._held
            return not (start < offset + len(view) and offset < stop)

        with self._change:
            self.reads.append((offset, len(view)))
            if not free():
                self._inside += 1
                self._change.notify_all()
                assert self._change.wait_for(lambda: self._passes > 0 or free(), WATCHDOG), "a read was forgotten"
                self._passes -= not free()
                self._inside -= 1
        super().read_into(view, offset, needed)

    def _pread(self, view: memoryview, offset: int) -> int:
        with self._change:
            for start, stop, times in self._failing:
                if start < offset + len(view) and offset < stop and times[0] > 0:
                    times[0] -= 1
                    raise OSError(errno.EIO, "scripted")
        return super()._pread(view[: self.most_bytes] if self.most_bytes else view, offset)


class PatternPool:
    """Expert memory in numpy arrays; implements :class:`expertier.residency.pool.ExpertPool` and distrusts its caller.

    Attributes
    ----------
    allowed : int
        Bytes that may be backed at any moment.
    violations : list of str
        Broken promises of the manager; a test ends with none.
    quotas : dict of int to int
        Bytes each layer may have backed at any moment.
    refuse : set of (int, int)
        Experts that :meth:`place` has no memory for.
    at_hand : set of int
        Layers whose experts need no reads.
    """

    def __init__(self, shapes: Shapes, offsets: Mapping[tuple[int, int], int], file: StorageFile, allowed: int) -> None:
        self.shapes = dict(shapes)
        self.offsets = dict(offsets)
        self.file = file
        self.allowed = allowed
        self.memory: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self.peak = 0
        self.quotas: dict[int, int] = {}
        self.refuse: set[tuple[int, int]] = set()
        self.at_hand: set[int] = set()
        self.violations: list[str] = []
        self.handed_over = 0
        self.closed = False
        self._computing: Counter[tuple[int, int]] = Counter()
        self._change = threading.Lock()

    # ---- ExpertPool

    def slot_bytes(self, layer: int) -> int:
        return self.shapes[layer].slot_bytes

    def stages(self, layer: int) -> int:
        return len(self.shapes[layer].parts)

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        with self._change:
            slot = self._slot(layer, expert, recycled)
            self.memory[layer, expert] = slot
            self.peak = max(self.peak, self.backed)
            self._check(self.backed <= self.allowed, f"{self.backed} bytes are backed, {self.allowed} are allowed")
            if (quota := self.quotas.get(layer)) is not None:
                held = sum(len(slot) for (owner, _), slot in self.memory.items() if owner == layer)
                self._check(held <= quota, f"layer {layer} holds {held} bytes, its quota is {quota}")
        reads = []
        for stage, (view, offset, size) in enumerate(self._parts(layer, expert, slot)):
            lead = offset % PAGE
            if layer in self.at_hand:
                view[lead : lead + size] = words(layer, expert, stage, size).view(np.uint8)
            else:
                reads.append(
                    PlannedRead(
                        stage=stage, file=self.file, offset=offset - lead, view=memoryview(view), needed=lead + size
                    )
                )
        return reads

    def _slot(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> NDArray[np.uint8]:
        self._check(not self.closed, "place after close")
        self._check(0 <= expert < self.shapes[layer].experts, f"layer {layer} has no expert {expert}")
        self._check_unused((layer, expert))
        if recycled != (layer, expert):
            self._check((layer, expert) not in self.memory, f"{(layer, expert)} placed twice")
        if recycled is not None:
            self._check(recycled in self.memory, f"{recycled} handed over without memory")
            self._check_unused(recycled)
            same = self.slot_bytes(recycled[0]) == self.slot_bytes(layer)
            self._check(same, f"{recycled} is of another size than {(layer, expert)}")
        if (layer, expert) in self.refuse:
            # What was asked for counts: a real pool may have had part of it for a moment.
            self.peak = max(self.peak, self.backed + (recycled is None) * self.slot_bytes(layer))
            raise ExpertLoadError(f"No memory mapping for expert {expert} of layer {layer}.")
        if recycled is not None:
            self.handed_over += recycled != (layer, expert)
            return self.memory.pop(recycled)  # with the old contents, as page tables would move them
        slot = aligned(self.slot_bytes(layer))
        slot.view(np.uint64)[:] = POISON
        return slot

    def drop(self, layer: int, expert: int) -> None:
        with self._change:
            self._check_unused((layer, expert))
            self.memory.pop((layer, expert), None)

    def close(self) -> None:
        self.closed = True
        self.memory.clear()

    # ---- what an engine does

    @property
    def backed(self) -> int:
        """Bytes held now."""
        return sum(len(slot) for slot in self.memory.values())

    def place_of(self, layer: int, expert: int, stage: int) -> tuple[int, int]:
        """Offset in the file and bytes of a part of an expert."""
        size = self.shapes[layer].parts[stage]
        return self.offsets[layer, stage] + expert * size, size

    @contextmanager
    def computing(self, layer: int, experts: Sequence[int]) -> Iterator[None]:
        """While it lasts, nobody may touch these experts' memory."""
        keys = [(layer, expert) for expert in dict.fromkeys(experts)]
        with self._change:
            self._computing.update(keys)
        try:
            yield
        finally:
            with self._change:
                self._computing.subtract(keys)

    def verify(self, layer: int, experts: Sequence[int], stage: int) -> None:
        """Check that every expert holds exactly its own bytes of `stage`."""
        for expert in experts:
            slot = self.memory.get((layer, expert))
            if slot is None:
                self._check(False, f"computed on the absent expert {(layer, expert)}")
                continue
            view, offset, size = self._parts(layer, expert, slot)[stage]
            lead = offset % PAGE
            found = view[lead : lead + size].view(np.uint64)
            self._check(
                np.array_equal(found, words(layer, expert, stage, size)),
                f"computed on {(layer, expert)} with foreign bytes in stage {stage}",
            )

    def _parts(self, layer: int, expert: int, slot: NDArray[np.uint8]) -> list[tuple[NDArray[np.uint8], int, int]]:
        parts = []
        start = 0
        for stage in range(self.stages(layer)):
            offset, size = self.place_of(layer, expert, stage)
            length = _pages(offset % PAGE + size)
            parts.append((slot[start : start + length], offset, size))
            start += _pages(size) + PAGE
        return parts

    def _check_unused(self, key: tuple[int, int]) -> None:
        self._check(not self._computing[key], f"the memory of {key} was taken while it was computed on")

    def _check(self, true: bool, message: str) -> None:
        if not true:
            self.violations.append(message)
            raise AssertionError(message)


def aligned(size: int) -> NDArray[np.uint8]:
    """Memory on a page boundary, as direct reads need it."""
    raw = np.empty(size + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + size]


@dataclass
class FakeEngine:
    """Runs layers the way an engine does: acquire, compute part after part, release."""

    manager: OffloadManager
    pool: PatternPool
    file: ScriptedFile
    shapes: Shapes

    def layer(self, layer: int, routes: Any, *, observe: bool = True, stagewise: bool = True) -> None:
        """Route, wait for every part just before it is used, and verify what is computed on."""
        experts = np.unique(np.asarray(routes, np.int64)).tolist()
        if observe:
            self.manager.observe(layer, routes)
        with self.manager.acquire(layer, routes, wait=not stagewise) as lease:
            for stage in range(self.pool.stages(layer)):
                lease.wait(stage)
                self.pool.verify(layer, experts, stage)
            with self.pool.computing(layer, experts):
                for stage in range(self.pool.stages(layer)):
                    self.pool.verify(layer, experts, stage)

    def step(self, routes: Mapping[int, Any], *, phase: Any = "decode") -> None:
        """One forward pass, the layers in order."""
        tokens = len(np.atleast_2d(np.asarray(next(iter(routes.values())))))
        self.manager.begin_step(tokens, phase)
        for layer in sorted(routes):
            self.layer(layer, routes[layer])
        self.manager.end_step()

    def resize(self, budget: int) -> None:
        """Change the budget, and with it what the memory tolerates: the larger one while it happens."""
        self.pool.allowed = max(self.pool.allowed, budget)
        self.manager.resize(budget)
        self.pool.allowed = budget

    def check(self) -> None:
        """What must hold whenever nobody is inside the manager."""
        stats = self.manager.stats()
        assert not self.pool.violations, self.pool.violations
        assert stats.resident_bytes == self.pool.backed
        assert stats.resident_bytes <= stats.budget_bytes
        assert stats.peak_resident_bytes == self.pool.peak


@contextmanager
def fake_engine(
    directory: Path,
    shapes: Shapes,
    budget: int,
    *,
    io_mode: IoMode = "auto",
    quotas: Mapping[int, int] | None = None,
    **config: Any,
) -> Iterator[FakeEngine]:
    """Build everything, and on the way out close it and check that no promise was broken."""
    path = directory / "model.bin"
    if path.exists():
        path.unlink()
    offsets = write_model(path, shapes)
    with engine_on(path, offsets, shapes, budget, io_mode=io_mode, quotas=quotas, **config) as engine:
        yield engine


@contextmanager
def engine_on(
    path: Path,
    offsets: Mapping[tuple[int, int], int],
    shapes: Shapes,
    budget: int,
    *,
    io_mode: IoMode = "auto",
    quotas: Mapping[int, int] | None = None,
    **config: Any,
) -> Iterator[FakeEngine]:
    """Like :func:`fake_engine` for a file that is written already."""
    file = ScriptedFile(path, io_mode)
    pool = PatternPool(shapes, offsets, file, budget)
    pool.quotas = dict(quotas or {})
    try:
        manager = OffloadManager(
            experts={layer: shape.experts for layer, shape in shapes.items()},
            top_k={layer: shape.top_k for layer, shape in shapes.items()},
            pool=pool,
            budget=budget,
            config=ManagerConfig(quotas=quotas, **config),
        )
    except BaseException:
        file.close()
        raise
    try:
        yield FakeEngine(manager=manager, pool=pool, file=file, shapes=shapes)
    finally:
        file.let_all()
        manager.close()
        file.close()
    assert not pool.violations, pool.violations


def until(condition: Callable[[], bool]) -> None:
    """Wait for something another thread does."""
    end = time.monotonic() + WATCHDOG
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


class Worker:
    """A thread whose end and exception a test can wait for."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        self.error: BaseException | None = None
        self._work = lambda: work(*arguments)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    @property
    def running(self) -> bool:
        """Whether the work has not ended."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end and raise what went wrong."""
        self._thread.join(WATCHDOG)
        assert not self._thread.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
