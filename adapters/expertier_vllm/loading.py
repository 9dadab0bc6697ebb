"""From checkpoint to sidecar: where every expert's tensors lie, and the file they are rearranged into.

vLLM hands out tensors that are mapped from safetensors files. Nothing of an expert is touched while it loads: only
file, offset and shape are noted. The first start writes the rearranged experts into a sidecar, reading the checkpoint
piece by piece past the page cache; later starts find the sidecar and read nothing of the experts.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from expertier.budget import format_bytes
from expertier.catalog.pack import SUFFIX, Pack, PackKey, read_pack
from expertier.catalog.types import ExpertPart
from expertier.errors import ExpertierError, SidecarError
from expertier.paths import cache_dir
from expertier.residency import pages
from expertier.residency.pages import PAGE
from expertier.storage import StorageFile


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor, or a strided piece of one, that belongs to an expert.

    Attributes
    ----------
    param, shard, name : str
        Parameter, shard and weight name that vLLM's ``weight_loader`` was called with.
    file : Path
        Where it lies.
    offset : int
        Of its first element, in bytes.
    shape, stride : tuple of int
        In elements.
    dtype : torch.dtype
        Of its elements.
    """

    param: str
    shard: str
    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


class MappedFiles:
    """Finds the file behind a mapped tensor.

    Parameters
    ----------
    files : iterable of Path
        The checkpoint's files; what is mapped from elsewhere does not count.

    Notes
    -----
    safetensors does not tell (``UntypedStorage.filename`` is empty), the kernel does: ``/proc/self/maps``. A tensor of
    every mapping is kept, so that the mapping stays and an address cannot come to mean another file.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {file.resolve() for file in files}
        self._starts: list[int] = []
        self._mappings: list[tuple[int, Path, int, torch.Tensor]] = []

    def locate(self, tensor: torch.Tensor) -> tuple[Path, int] | None:
        """Return the file and the offset of a tensor's first element, ``None`` for one that is not mapped."""
        address = tensor.data_ptr()
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._mappings[index][0]:
            if not self._learn(address, tensor):
                return None
            index = bisect.bisect_right(self._starts, address) - 1
        _, path, origin, _ = self._mappings[index]
        return path, origin + address - self._starts[index]

    def _learn(self, address: int, tensor: torch.Tensor) -> bool:
        with open("/proc/self/maps", encoding="utf-8") as lines:
            for line in lines:
                fields = line.split(maxsplit=5)
                start, end = (int(edge, 16) for edge in fields[0].split("-"))
                if start <= address < end:
                    if len(fields) < 6 or Path(fields[5].rstrip("\n")) not in self._files:
                        return False
                    index = bisect.bisect_right(self._starts, start)
                    self._starts.insert(index, start)
                    self._mappings.insert(index, (end, Path(fields[5].rstrip("\n")), int(fields[2], 16), tensor))
                    return True
        return False

    def forget(self) -> None:
        """Let the mappings go."""
        self._starts.clear()
        self._mappings.clear()


class SourceReader:
    """Reads checkpoint tensors one at a time, past the page cache.

    Parameters
    ----------
    io_mode : {"auto", "direct", "buffered"}
        As for :class:`expertier.storage.StorageFile`.
    """

    def __init__(self, io_mode: str) -> None:
        self._mode = io_mode
        self._files: dict[Path, StorageFile] = {}
        self._scratch = (0, 0)

    def read(self, source: Source) -> torch.Tensor:
        """Return a tensor that is valid until the next call.

        Raises
        ------
        ExpertLoadError
            The file cannot be read or has become shorter.
        """
        lead = source.offset % PAGE
        needed = lead + source.span
        size = -(-needed // PAGE) * PAGE
        if size > self._scratch[1]:
            self._unmap()
            self._scratch = (pages.scratch(size), size)
        file = self._files.get(source.file)
        if file is None:
            file = self._files[source.file] = StorageFile(source.file, self._mode)  # type: ignore[arg-type]
        view = pages.view(self._scratch[0], size)
        file.read_into(view, source.offset - lead, needed)
        flat = torch.frombuffer(view, dtype=source.dtype, count=source.span // source.dtype.itemsize, offset=lead)
        return flat.as_strided(source.shape, source.stride)

    def close(self) -> None:
        """Close the files and free the buffer."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._unmap()

    def _unmap(self) -> None:
        if self._scratch[1]:
            pages.unmap(*self._scratch)
            self._scratch = (0, 0)


def tensor_at(address: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor over memory at an address; nothing of it is touched, and it does not own it."""
    count = 1
    for size in shape:
        count *= size
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(*shape)


# ---- the sidecar -----------------------------------------------------------------------------------------------------


def sidecar_name(checkpoint: Path, key: PackKey) -> str:
    """File name of the sidecar of a checkpoint for a key."""
    return f"{checkpoint.absolute().name}.{key.short}{SUFFIX}"


def sidecar_directories(checkpoint: Path, chosen: str | None) -> list[Path]:
    """Where sidecars of a checkpoint are looked for and written, best place first."""
    if chosen:
        return [Path(chosen).expanduser().absolute()]
    directories = [checkpoint.absolute()]
    with contextlib.suppress(ExpertierError):  # only a second choice; the first may do
        directories.append(cache_dir() / "sidecars")
    return directories


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


@contextlib.contextmanager
def announce(path: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Tell that a sidecar is being written, with a progress bar on a terminal."""
    text = f"expertier: writing rearranged experts ({format_bytes(size)}) to {path}; needed once for this model and CPU"
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    console.print(text, markup=False, highlight=False)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=size)
        yield lambda count: progress.advance(task, count)
