"""Opening and reading model files; whatever goes wrong has a name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from expertier.errors import ModelFormatError, ModelNotFoundError


@contextmanager
def opened(path: Path, remedy: str) -> Iterator[tuple[int, int]]:
    """Open a regular file for reading; anything else is refused by name.

    Parameters
    ----------
    path : Path
        The file.
    remedy : str
        What to tell the user when it cannot be opened.

    Yields
    ------
    descriptor, size : int
        Closed on leaving. An ``OSError`` inside becomes a ModelNotFoundError.

    Raises
    ------
    ModelNotFoundError
        `path` does not exist, is no regular file, or cannot be read.
    """
    try:
        # O_NONBLOCK: a named pipe must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"There is no model file {path}.", remedy) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFoundError(f"The model file {path} cannot be opened: {reason}.", remedy) from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ModelNotFoundError(f"{path} is a directory, not a model file.", remedy)
        if not stat.S_ISREG(status.st_mode):
            raise ModelNotFoundError(f"{path} is not a regular file.", remedy)
        yield descriptor, status.st_size
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise ModelNotFoundError(f"The model file {path} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Read `length` bytes, or fewer where the file ends before."""
    data = bytearray()
    while len(data) < length and (more := os.pread(descriptor, length - len(data), offset + len(data))):
        data += more
    return bytes(data)


def read_ranges(path: Path, size: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read some ranges of a file.

    Parameters
    ----------
    path : Path
        The file.
    size : int
        What its size was when its header was read, in bytes.
    ranges : sequence of (int, int)
        Offset and length of each.

    Returns
    -------
    list of bytes
        As long as asked for.

    Raises
    ------
    ModelNotFoundError
        The file can no longer be read.
    ModelFormatError
        It has become shorter.
    """
    pieces: list[bytes] = []
    with opened(path, "Do not move a model while it is used.") as (descriptor, _):
        for offset, length in ranges:
            piece = read_at(descriptor, length, offset)
            if len(piece) < length:
                raise ModelFormatError(
                    f"{path} became shorter than {size} bytes.", "Do not change a model while it is used."
                )
            pieces.append(piece)
    return pieces
