"""What the system caches: readahead of the model's device, and the page cache before a run."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

_DROP = Path("/proc/sys/vm/drop_caches")
_STEP = 1 << 30


class Readahead:
    """Readahead of the filesystem that holds a file.

    Parameters
    ----------
    path : Path
        The file.
    root : Path
        Root of the file tree to look at (for tests).

    Attributes
    ----------
    control : Path or None
        The kernel's setting; ``None`` if the filesystem has none.
    """

    def __init__(self, path: Path, root: Path = Path("/")) -> None:
        device = os.stat(path).st_dev
        control = root / f"sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
        self.control = control if control.exists() else None

    def value(self) -> int | None:
        """KiB now, ``None`` if unknown."""
        return None if self.control is None else int(self.control.read_text())

    def obstacle(self) -> str:
        """Why it cannot be changed, empty if it can."""
        if self.control is None:
            return "the filesystem of the model has no readahead setting"
        if not os.access(self.control, os.W_OK):
            return f"{self.control} is not writable (needs root)"
        return ""

    @contextlib.contextmanager
    def at(self, kibibytes: int | None) -> Iterator[None]:
        """Hold the setting at `kibibytes` while the block runs and restore it afterwards; ``None`` changes nothing."""
        before = self.value()
        if self.control is None or kibibytes is None or kibibytes == before:
            yield
            return
        self.control.write_text(str(kibibytes))
        try:
            yield
        finally:
            self.control.write_text(str(before))


def drop_method() -> str:
    """How the page cache is emptied here."""
    return "drop_caches" if os.access(_DROP, os.W_OK) else "posix_fadvise(DONTNEED) on the model"


def drop_caches(files: Sequence[Path]) -> int | None:
    """Empty the page cache as far as allowed.

    Returns
    -------
    int or None
        Bytes of `files` that are cached nevertheless (another process maps them), ``None`` if that cannot be seen.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)  # a page that is not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    with contextlib.suppress(OSError):
        _DROP.write_text("1")
    try:
        return sum(cached_bytes(file) for file in files)
    except OSError:
        return None


def cached_bytes(file: Path) -> int:
    """Bytes of a file in the page cache.

    Raises
    ------
    OSError
        The file cannot be opened or mapped.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    page, total = mmap.PAGESIZE, 0
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        for start in range(0, size, _STEP):
            length = min(_STEP, size - start)
            address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
            if address == ctypes.c_void_p(-1).value:
                raise OSError(ctypes.get_errno(), "mmap")
            state = ctypes.create_string_buffer(-(-length // page))
            if libc.mincore(address, length, state):
                code = ctypes.get_errno()
                libc.munmap(address, length)
                raise OSError(code, "mincore")
            libc.munmap(address, length)
            total += sum(byte & 1 for byte in state.raw) * page
    finally:
        os.close(descriptor)
    return min(total, size)
