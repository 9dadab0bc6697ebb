"""A model file as llama.cpp sees it: everything is really read, except the experts, which cost nothing.

``llama_model_load_from_file_ptr`` reads a model through a C ``FILE*``. Giving it a stream of our own means that no byte
of an expert is read or mapped while loading, that nothing of the model stays in the page cache, and that a split model
appears as one file. No library internals are touched for it.
"""

from __future__ import annotations

import bisect
import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_ssize_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_libc = ctypes.CDLL(None, use_errno=True)
_Read = CFUNCTYPE(c_ssize_t, c_void_p, c_void_p, c_size_t)
_Seek = CFUNCTYPE(c_int, c_void_p, POINTER(c_int64), c_int)


class _CookieFunctions(Structure):
    """glibc and musl: ``cookie_io_functions_t`` of fopencookie(3)."""

    _fields_ = (("read", _Read), ("write", c_void_p), ("seek", _Seek), ("close", c_void_p))


_libc.fopencookie.restype = c_void_p
_libc.fopencookie.argtypes = [c_void_p, c_char_p, _CookieFunctions]
_libc.setvbuf.argtypes = [c_void_p, c_void_p, c_int, c_size_t]
_libc.fclose.argtypes = [c_void_p]
_IOFBF = 0
_BUFFER = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A run of the virtual file.

    Attributes
    ----------
    start, size : int
        Position in the virtual file.
    file : Path or None
        Where the bytes come from; ``None`` for bytes that are never read.
    offset : int
        Position in `file`.
    """

    start: int
    size: int
    file: Path | None
    offset: int = 0


class VirtualFile:
    """Opens a C stream over a header and extents; a context manager.

    Parameters
    ----------
    header : bytes
        What the file begins with.
    extents : sequence of Extent
        The rest, ascending and without overlap; gaps read as zeros.
    on_progress : callable, optional
        Called with the number of bytes really read so far.

    Attributes
    ----------
    pointer : int
        The ``FILE*``.
    error : BaseException or None
        What went wrong inside a read, if anything did.
    """

    def __init__(
        self, header: bytes, extents: Sequence[Extent], on_progress: Callable[[int], None] | None = None
    ) -> None:
        self._header = header
        self._extents = sorted(extents, key=lambda extent: extent.start)
        self._starts = [extent.start for extent in self._extents]
        self._size = max([len(header)] + [extent.start + extent.size for extent in self._extents])
        self._position = 0
        self._descriptors: dict[Path, int] = {}
        self._on_progress = on_progress
        self.bytes_read = 0
        self.error: BaseException | None = None
        self._functions = _CookieFunctions(_Read(self._read), None, _Seek(self._seek), None)
        self.pointer = int(_libc.fopencookie(None, b"rb", self._functions) or 0)
        if not self.pointer:
            code = ctypes.get_errno()
            raise OSError(code, f"fopencookie: {os.strerror(code)}")
        _libc.setvbuf(self.pointer, None, _IOFBF, _BUFFER)

    def _seek(self, _cookie: int, offset: POINTER(c_int64), whence: int) -> int:  # type: ignore[valid-type]
        origin = (0, self._position, self._size)[whence]
        target = origin + offset[0]  # type: ignore[index]
        if target < 0:
            return -1
        self._position = offset[0] = target  # type: ignore[index]
        return 0

    def _read(self, _cookie: int, buffer: int, size: int) -> int:
        try:
            return self._read_at(buffer, min(size, self._size - self._position))
        except BaseException as error:  # must not cross into C; the loader raises it
            self.error = error
            ctypes.set_errno(getattr(error, "errno", None) or 5)
            return -1

    def _read_at(self, buffer: int, size: int) -> int:
        done = 0
        while done < size:
            here = self._position
            if here < len(self._header):
                count = min(size - done, len(self._header) - here)
                ctypes.memmove(buffer + done, self._header[here : here + count], count)
            else:
                index = bisect.bisect_right(self._starts, here) - 1
                extent = self._extents[index] if index >= 0 else None
                if extent is None or here >= extent.start + extent.size:
                    following = self._starts[index + 1] if index + 1 < len(self._starts) else self._size
                    count = min(size - done, following - here)
                    ctypes.memset(buffer + done, 0, count)
                else:
                    count = min(size - done, extent.start + extent.size - here)
                    if extent.file is not None:
                        self._copy(buffer + done, extent.file, extent.offset + here - extent.start, count)
            done += count
            self._position += count
        return done

    def _copy(self, target: int, path: Path, offset: int, size: int) -> None:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        destination = memoryview((ctypes.c_char * size).from_address(target)).cast("B")
        done = 0
        while done < size:
            count = os.preadv(descriptor, [destination[done:]], offset + done)
            if count == 0:
                raise EOFError(f"{path} ended at offset {offset + done}, {size - done} bytes early")
            done += count
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
        self.bytes_read += size
        if self._on_progress:
            self._on_progress(self.bytes_read)

    def __enter__(self) -> VirtualFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _libc.fclose(self.pointer)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
