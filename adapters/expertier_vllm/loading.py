"""The sidecar: where the rearranged experts of a checkpoint are looked for, written and read.

The first start writes it, later ones find it and read nothing of the checkpoint's experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from expertier.budget import format_bytes
from expertier.catalog.pack import SUFFIX, Pack, PackKey, read_pack
from expertier.catalog.sidecar import announced
from expertier.catalog.types import ExpertPart
from expertier.errors import SidecarError
from expertier.residency import pages
from expertier.storage import StorageFile


def sidecar_name(checkpoint: Path, key: PackKey) -> str:
    """File name of the sidecar of a checkpoint for a key."""
    return f"{checkpoint.absolute().name}.{key.short}{SUFFIX}"


def find_sidecar(directories: Sequence[Path], name: str, key: PackKey) -> Pack | None:
    """Return the sidecar of an earlier start, if there is one that is whole and made for `key`."""
    for directory in directories:
        path = directory / name
        if path.exists():
            with contextlib.suppress(SidecarError):  # building it anew tells why
                return read_pack(path, key)
    return None


def read_rows(file: StorageFile, pack: Pack, part: ExpertPart, dtype: torch.dtype) -> torch.Tensor:
    """Read the rows of all experts of a small part, shape ``(experts, ...)``.

    Raises
    ------
    SidecarError
        They are damaged.
    ExpertLoadError
        They cannot be read.
    """
    rows = torch.empty(part.experts * part.expert_bytes, dtype=torch.uint8)
    size = part.experts * part.stride
    scratch = pages.scratch(size)
    try:
        view = pages.view(scratch, size)
        file.read_into(view, part.offset, size)
        for expert in range(part.experts):
            start = expert * part.stride
            piece = view[start : start + part.expert_bytes]
            if (check := pack.check(part.name, expert)) is not None:
                check(piece)
            rows[expert * part.expert_bytes : (expert + 1) * part.expert_bytes] = torch.frombuffer(
                piece, dtype=torch.uint8
            )
    finally:
        pages.unmap(scratch, size)
    return rows.view(dtype).view(part.experts, *reversed(part.shape[:-1]))


def announce(path: Path, size: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Tell that a sidecar is being written; see :func:`expertier.catalog.sidecar.announced`."""
    return announced(
        f"expertier: writing rearranged experts ({format_bytes(size)}) to {path}; needed once for this model and CPU",
        size,
    )
