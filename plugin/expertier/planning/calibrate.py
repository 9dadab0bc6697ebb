"""Measures how fast experts come from storage, with the very code that reads them later."""

from __future__ import annotations

import contextlib
import mmap
import queue
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertier.errors import ModelFormatError
from expertier.storage import PAGE, IoMode, IoScheduler, ReadRequest, StorageFile

_CHUNK = 4 << 20


@dataclass(frozen=True, kw_only=True)
class DiskSpeed:
    """Speed of the storage a file lies on.

    Attributes
    ----------
    direct : bool
        Whether the reads bypassed the page cache; if not, the figures may be those of memory.
    sequential, random : float
        Bytes per second: one reader front to back; `threads` reads of `read_bytes` in flight at random places.
    read_bytes : int
        Size of one random read, that of an expert.
    threads : int
        Random reads in flight.
    measured_bytes : int
        Bytes read altogether.
    """

    direct: bool
    sequential: float
    random: float
    read_bytes: int
    threads: int
    measured_bytes: int

    @property
    def best(self) -> float:
        """The faster of the two: what a bound may assume."""
        return max(self.sequential, self.random)


def measure_disk(
    files: Sequence[Path],
    *,
    read_bytes: int,
    threads: int = 2,
    mode: IoMode = "auto",
    most_bytes: int = 256 << 20,
    most_seconds: float = 2.0,
) -> DiskSpeed:
    """Measure sequential and expert-sized random reads.

    Parameters
    ----------
    files : sequence of Path
        Where to read; the largest one is used.
    read_bytes : int
        Size of a random read.
    threads : int
        Random reads in flight.
    mode : {"auto", "direct", "buffered"}
        As for :class:`expertier.storage.StorageFile`.
    most_bytes, most_seconds : int, float
        Each of the two measurements ends at whichever comes first.

    Raises
    ------
    ModelNotFoundError, ExpertLoadError
        A file cannot be opened or read.
    ModelFormatError
        The file is smaller than a page.
    """
    path = max(files, key=lambda file: file.stat().st_size)
    file = StorageFile(path, mode)
    try:
        if file.size < PAGE:
            raise ModelFormatError(f"{path} is too small to measure reads.", "Name a real model file.")
        usable = file.size // PAGE * PAGE
        chunk = min(_CHUNK, usable)
        read_bytes = min(-(-read_bytes // PAGE) * PAGE, usable)
        sequential, first = _sequential(file, usable, chunk, most_bytes, most_seconds)
        scattered, second = _random(file, usable, read_bytes, threads, most_bytes, most_seconds)
        return DiskSpeed(
            direct=file.direct,
            sequential=sequential,
            random=scattered,
            read_bytes=read_bytes,
            threads=threads,
            measured_bytes=first + second,
        )
    finally:
        file.close()


def _sequential(file: StorageFile, usable: int, chunk: int, most: int, seconds: float) -> tuple[float, int]:
    view = _buffer(chunk)
    done = 0
    started = time.perf_counter()
    while done < most and time.perf_counter() - started < seconds:
        file.read_into(view, done % (usable // chunk * chunk), chunk)
        done += chunk
    return done / (time.perf_counter() - started), done


def _random(
    file: StorageFile, usable: int, read_bytes: int, threads: int, most: int, seconds: float
) -> tuple[float, int]:
    finished: queue.SimpleQueue[tuple[ReadRequest, BaseException | None]] = queue.SimpleQueue()
    generator = random.Random(0)
    views = [_buffer(read_bytes) for _ in range(threads)]
    scheduler = IoScheduler(lambda request, error, _: finished.put((request, error)), threads=threads)
    done = 0
    try:

        def submit(index: int) -> None:
            offset = generator.randrange((usable - read_bytes) // PAGE + 1) * PAGE
            scheduler.submit([ReadRequest(file=file, offset=offset, view=views[index], needed=read_bytes, tag=index)])

        started = time.perf_counter()
        for index in range(threads):
            submit(index)
        while True:
            request, error = finished.get()
            if error is not None:
                raise error
            done += read_bytes
            elapsed = time.perf_counter() - started
            if done >= most or elapsed >= seconds:
                return done / elapsed, done
            submit(request.tag)
    finally:
        scheduler.close()


def _buffer(size: int) -> memoryview:
    buffer = mmap.mmap(-1, size)
    with contextlib.suppress(AttributeError, OSError):  # as experts' windows are: reads into them cost half
        buffer.madvise(mmap.MADV_HUGEPAGE)
    for place in range(0, size, PAGE):
        buffer[place] = 0  # the first touch of memory is not the disk's time
    return memoryview(buffer)
