"""Files opened for expert reads: O_DIRECT where the filesystem has it, buffered with cache dropping where not."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Literal

from expertier.errors import ExpertLoadError, ModelNotFoundError

PAGE = mmap.PAGESIZE
"""Alignment of offset, length and memory that every O_DIRECT filesystem accepts."""

IoMode = Literal["auto", "direct", "buffered"]


class StorageFile:
    """A file read by absolute offset from many threads at once.

    Parameters
    ----------
    path : Path
        File to open.
    mode : {"auto", "direct", "buffered"}
        ``auto`` uses O_DIRECT and falls back to buffered reads when the filesystem refuses it, either at open
        (tmpfs, some overlays) or at the first read (filesystems that accept the flag but not the request).

    Notes
    -----
    Buffered reads drop what they read from the page cache, so that experts are not held twice and the memory
    outside the budget stays bounded.
    """

    def __init__(self, path: Path, mode: IoMode = "auto") -> None:
        self.path = path
        try:
            self._buffered_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelNotFoundError(
                f"Cannot open {path}: {error.strerror}.", "Check the path and its permissions."
            ) from error
        self.size = os.fstat(self._buffered_fd).st_size
        self._open_fds = [self._buffered_fd]
        self._direct_fd = -1
        if mode != "buffered":
            try:
                self._direct_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                self._open_fds.append(self._direct_fd)
            except OSError as error:
                if mode == "direct":
                    self.close()
                    raise ExpertLoadError(
                        f"The filesystem of {path} has no O_DIRECT ({error.strerror}).",
                        "Use io_mode='auto' to fall back to buffered reads.",
                    ) from error
        if self._direct_fd < 0:
            os.posix_fadvise(self._buffered_fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._may_fall_back = mode == "auto"

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._direct_fd >= 0

    def read_into(self, view: memoryview, offset: int, needed: int) -> None:
        """Fill `view` from `offset`, tolerating an end of file after `needed` bytes.

        Parameters
        ----------
        view : memoryview
            Destination; for O_DIRECT its address, its length and `offset` are multiples of :data:`PAGE`.
        offset : int
            Absolute file offset in bytes.
        needed : int
            Bytes that must arrive; the rest of `view` is alignment padding that may lie beyond the end of the file.

        Raises
        ------
        ExpertLoadError
            On an I/O error or when the file ends before `needed` bytes.
        """
        done = 0
        while done < needed:
            try:
                count = self._pread(view[done:] if done else view, offset + done)
            except OSError as error:
                raise ExpertLoadError(
                    f"Reading {self.path} at offset {offset + done} failed: {os.strerror(error.errno or 0)}.",
                    "Check the disk (dmesg) and that the file was not replaced while in use.",
                ) from error
            if count == 0:
                raise ExpertLoadError(
                    f"{self.path} ended at {offset + done}, {needed - done} bytes short of an expert.",
                    "The file was truncated while in use: restore it and load the model again.",
                )
            done += count

    def _pread(self, view: memoryview, offset: int) -> int:
        direct = self._direct_fd  # once: another thread may fall back meanwhile
        # A short direct read can end off alignment; only the buffered descriptor can continue from there.
        if direct >= 0 and offset % PAGE == 0:
            try:
                return os.preadv(direct, [view], offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._may_fall_back:
                    raise
                self._direct_fd = -1  # the descriptor stays open: another thread may be inside a read
        count = os.preadv(self._buffered_fd, [view], offset)
        os.posix_fadvise(self._buffered_fd, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def drop_cache(self) -> None:
        """Drop what the page cache holds of the file."""
        os.posix_fadvise(self._buffered_fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptors; later reads raise."""
        self._buffered_fd = self._direct_fd = -1
        while self._open_fds:
            os.close(self._open_fds.pop())
