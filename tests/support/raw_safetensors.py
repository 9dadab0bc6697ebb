"""Builds safetensors files byte by byte, valid or wrong on purpose."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "I32": 32,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor with the bytes to write; `data` of None means bytes made from the name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def content(self) -> bytes:
        if self.data is not None:
            return self.data
        seed = self.name.encode()
        return (seed * (self.nbytes // len(seed) + 1))[: self.nbytes]


def table(tensors: Sequence[Tensor]) -> dict[str, dict[str, object]]:
    """Return the header's entries for tensors that lie one after the other."""
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for tensor in tensors:
        start, end = end, end + len(tensor.content())
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return entries


def file_of(header: Mapping[str, object] | str | bytes, data: bytes = b"") -> bytes:
    """Return a file with any header before `data`."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def build(tensors: Sequence[Tensor]) -> bytes:
    """Return a whole file."""
    return file_of(
        {"__metadata__": {"format": "pt"}, **table(tensors)}, b"".join(tensor.content() for tensor in tensors)
    )
