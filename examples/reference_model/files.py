"""Writing big files so that a failure leaves nothing half-made behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from expertier.errors import ExpertierError

# A file system that is filled to the last byte troubles everything else on the machine.
_SPARE_BYTES = 64 << 20


class DiskFullError(ExpertierError):
    """The file does not fit on the disk."""


def require_space(folder: Path, needed: int) -> None:
    """Check that `needed` bytes fit into `folder`.

    Raises
    ------
    DiskFullError
        They do not, with both figures in the message.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise DiskFullError(
            f"{needed / 1e9:.2f} GB are needed in {folder}, but only {free / 1e9:.2f} GB are free.",
            "Free some space, choose another folder with --out, or a smaller --size.",
        )


@contextlib.contextmanager
def new_file(path: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    Parameters
    ----------
    path : Path
        The file to make; its folder is created. An old file of that name stays intact until the new one is whole.
    needed : int
        Bytes it will take.

    Raises
    ------
    DiskFullError
        There is no room for it, known beforehand or found out on the way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, needed)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"The disk became full while {path} was written.",
                "Free some space or choose another folder with --out.",
            ) from error
        raise
    finally:
        part.unlink(missing_ok=True)
