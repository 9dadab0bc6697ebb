"""Address space for experts: reserved once, backed by memory only where an expert lives, memory moved not copied."""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_int, c_long, c_size_t, c_void_p

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x2, 0x10, 0x20, 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 4, 14, 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = c_void_p
_libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
_libc.munmap.argtypes = [c_void_p, c_size_t]
_libc.mremap.restype = c_void_p
_libc.mremap.argtypes = [c_void_p, c_size_t, c_size_t, c_int, c_void_p]
_libc.madvise.argtypes = [c_void_p, c_size_t, c_int]
_FAILED = ctypes.c_void_p(-1).value


def _raise(call: str) -> None:
    code = ctypes.get_errno()
    raise OSError(code, f"{call}: {os.strerror(code)}")


def _map(address: int | None, size: int, protection: int) -> int:
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if address else 0)
    result = _libc.mmap(address, size, protection, flags, -1, 0)
    if result == _FAILED:
        _raise("mmap")
    return int(result)


def reserve(size: int) -> int:
    """Reserve address space aligned to :data:`HUGE_PAGE`; touching it is an error until part of it is backed."""
    raw = _map(None, size + HUGE_PAGE, _PROT_NONE)
    start = -(-raw // HUGE_PAGE) * HUGE_PAGE
    if start > raw:
        _libc.munmap(raw, start - raw)
    tail = raw + size + HUGE_PAGE - (start + size)
    if tail:
        _libc.munmap(start + size, tail)
    return start


def scratch(size: int) -> int:
    """Map writable memory that costs nothing until touched."""
    return _map(None, size, _PROT_READ | _PROT_WRITE)


def unmap(address: int, size: int) -> None:
    """Give address space back."""
    if _libc.munmap(address, size):
        _raise("munmap")


def back(address: int, size: int, *, huge: bool) -> None:
    """Make a reserved range usable; memory arrives page by page when first written.

    With `huge`, whole 2 MiB steps inside the range may be huge pages: reads into them pin 512 times fewer pages.
    Never more than `size` bytes are used, because a huge page cannot cross the end of the mapping.
    """
    _map(address, size, _PROT_READ | _PROT_WRITE)
    if huge:
        _libc.madvise(address, size, _MADV_HUGEPAGE)  # advice only: without huge pages it still works


def populate(piece: memoryview) -> None:
    """Have the system fill backed memory with pages now, all at once.

    A direct read into memory without pages faults them in one by one while it pins them: 44 ms for 18 MB, where this
    takes 4 ms and the read into present pages 7 ms. Before Linux 5.14 it does nothing, and the read faults.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(piece))
    first = start // PAGE * PAGE
    _libc.madvise(first, start + len(piece) - first, _MADV_POPULATE_WRITE)


def release(address: int, size: int) -> None:
    """Give the memory of a range back and make touching it an error again."""
    _map(address, size, _PROT_NONE)


def discard(address: int, size: int) -> None:
    """Give the memory of a range back but leave it readable (as zeros)."""
    if _libc.madvise(address, size, _MADV_DONTNEED):
        _raise("madvise")


def move(source: int, target: int, size: int) -> bool:
    """Move the memory behind `source` to `target`, which then holds the old contents; `source` is reserved again.

    Page tables change, bytes do not: about 20 us for 18 MB, where giving pages back and faulting zeroed ones in costs
    tens of milliseconds.

    Returns
    -------
    bool
        ``False`` when the kernel cannot (before Linux 5.7, or too many mappings): nothing has changed then.
    """
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    if _libc.mremap(source, size, size, flags, target) != target:
        return False
    _map(source, size, _PROT_NONE)
    return True


def view(address: int, size: int) -> memoryview:
    """Bytes at an address as a writable buffer."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
