"""The checkpoint's files while a model loads: experts are handed to vLLM without being read.

vLLM's loaders get a tensor for every tensor of the checkpoint. What belongs to no expert is read as it is needed. Of an
expert they get a view of mapped memory that nobody touches: only where it lies is noted, and whoever wants the bytes
reads them past the page cache. The stock iterator would have the system read every file ahead, experts and all.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from expertier.catalog.safetensors_header import CheckpointLayout, StoredTensor
from expertier.catalog.types import Catalog
from expertier.errors import UnsupportedModelError
from expertier.residency import pages
from expertier.residency.pages import PAGE
from expertier.storage import StorageFile
from expertier.storage.files import IoMode

_MAP_NORESERVE: Final = 0x4000  # Python names it from 3.13 on
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
        return (last + 1) * int(self.dtype.itemsize)


class CheckpointFiles:
    """Hands out a checkpoint's tensors, experts as views that are not to be touched.

    Parameters
    ----------
    layout : CheckpointLayout
        Headers of all files.
    catalog : Catalog
        Says which tensors are experts.
    """

    def __init__(self, layout: CheckpointLayout, catalog: Catalog) -> None:
        self._files = {file.path.resolve(): file for file in layout.files}
        starts: dict[Path, list[int]] = {}
        for layer in catalog.layers:
            for part in layer.parts:
                for expert in range(part.experts):
                    for piece in part.pieces(expert):
                        starts.setdefault(piece.file.resolve(), []).append(piece.offset)
        self._experts = {path: sorted(offsets) for path, offsets in starts.items()}
        self._mapped: list[tuple[int, int, Path, mmap.mmap]] = []  # start, end

    def tensors(self, paths: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors of some files, in the order of stock's iterator.

        Raises
        ------
        UnsupportedModelError
            A file, or a type in it, is unknown.
        ExpertLoadError
            A tensor cannot be read.
        """
        for path in paths:
            file = self._files.get(Path(path).resolve())
            if file is None:
                raise UnsupportedModelError(
                    f"vLLM loads weights from {path}, which is none of the checkpoint's files.",
                    "Start without Expertier.",
                )
            mapping = self._map(file.path)
            storage = StorageFile(file.path, "buffered")
            try:
                for tensor in sorted(file.tensors, key=lambda tensor: tensor.name):
                    yield tensor.name, self._view(tensor, mapping, storage)
            finally:
                storage.close()

    def _map(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            # Writable and private: a loader that changes a tensor in place changes a copy.
            mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        mapping.madvise(mmap.MADV_RANDOM)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._mapped.append((start, start + len(mapping), path, mapping))
        self._mapped.sort(key=lambda entry: entry[0])
        return mapping

    def _view(self, tensor: StoredTensor, mapping: mmap.mmap, storage: StorageFile) -> torch.Tensor:
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise UnsupportedModelError(
                f"{tensor.file} stores {tensor.name} as {tensor.dtype}, which is not known here.",
                "Start without Expertier.",
            )
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype)
        if self._is_expert(tensor):
            count = tensor.nbytes // dtype.itemsize
            return torch.frombuffer(mapping, dtype=dtype, count=count, offset=tensor.offset).view(tensor.shape)
        read = torch.empty(tensor.nbytes, dtype=torch.uint8)
        storage.read_into(pages.view(read.data_ptr(), tensor.nbytes), tensor.offset, tensor.nbytes)
        return read.view(dtype).view(tensor.shape)

    def _is_expert(self, tensor: StoredTensor) -> bool:
        starts = self._experts.get(tensor.file.resolve(), [])
        index = bisect.bisect_left(starts, tensor.offset)
        return index < len(starts) and starts[index] < tensor.offset + tensor.nbytes

    def locate(self, tensor: torch.Tensor) -> tuple[Path, int] | None:
        """Return file and offset of the first element of an expert's tensor; ``None`` for one made in memory."""
        address = tensor.data_ptr()
        index = bisect.bisect_right(self._mapped, address, key=lambda entry: entry[0]) - 1
        if index < 0 or address >= self._mapped[index][1]:
            return None
        start, _, path, _ = self._mapped[index]
        return path, address - start

    def close(self) -> None:
        """Let the mappings go, as soon as nobody refers to them."""
        self._mapped.clear()


class SourceReader:
    """Reads checkpoint tensors one at a time, past the page cache.

    Parameters
    ----------
    mode : {"auto", "direct", "buffered"}
        As for :class:`expertier.storage.StorageFile`.
    """

    def __init__(self, mode: IoMode) -> None:
        self._mode = mode
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
            file = self._files[source.file] = StorageFile(source.file, self._mode)
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
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(*shape)
