"""Reads the header of one GGUF file: keys, tensor table, and nothing else.

The header of a real model is mostly its vocabulary (hundreds of thousands of strings). This parser steps over those
arrays without building Python objects for them, so that opening a model takes a fraction of a second, and it checks
every count and offset against the size of the file before acting on it: a damaged header is refused by name, it never
exhausts memory or loops.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

from expertier.catalog.files import opened
from expertier.errors import ModelFormatError, UnsupportedModelError

Scalar = int | float | bool | str
KeyValue = Scalar | tuple[Scalar, ...]

MAGIC: Final = b"GGUF"
SUPPORTED_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32

# Storage types of ggml: id -> (name, elements per block, bytes per block).
# Kept here, not taken from the gguf package, because ggml knows types which that package does not name yet.
TENSOR_TYPES: Final[Mapping[int, tuple[str, int, int]]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 36),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
        42: ("Q2_0", 64, 18),
    }
)

_STRING: Final = 8
_ARRAY: Final = 9
_SCALAR_CODES: Final[Mapping[int, str]] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")

_MAX_DIMS: Final = 4
_MIN_KEY_BYTES: Final = 8 + 4 + 1  # length of the name, value type, smallest value
_MIN_TENSOR_BYTES: Final = 8 + 4 + 4 + 8  # length of the name, dimensions, type, offset
_MAX_HEADER_BYTES: Final = 512 << 20  # the largest vocabularies in use need about 20 MB
_LONGEST_KEPT_ARRAY: Final = 4096  # per-layer settings are kept, vocabularies are not
_LONGEST_NAME: Final = 65535
_MAX_ALIGNMENT: Final = 64 << 20
_FIRST_READ: Final = 1 << 20

_NAME_THE_FILE: Final = "Name the .gguf file of the model (of a split model the first one, ...-00001-of-0000N.gguf)."
_DAMAGED: Final = "The file is damaged or its download was cut short: fetch it again."


@dataclass(frozen=True, kw_only=True)
class GgufKey:
    """Where one key/value pair lies in a header.

    Attributes
    ----------
    name : str
        Key, e.g. ``general.architecture``.
    offset : int
        Byte offset in the file of the pair (of the length of its name).
    nbytes : int
        Bytes of the pair: name, type and value.
    """

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One row of the tensor table.

    Attributes
    ----------
    name : str
        Tensor name, e.g. ``blk.0.ffn_up_exps.weight``.
    type_id : int
        Storage type as ggml numbers it.
    type_name : str
        Its name, e.g. ``Q4_K``.
    shape : tuple of int
        Fastest dimension first, as stored (numpy's shape is the reverse).
    offset : int
        Absolute byte offset in the file.
    nbytes : int
        Bytes of data, without padding.
    """

    name: str
    type_id: int
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """Everything that the header of one GGUF file says.

    Attributes
    ----------
    path : Path
        The file.
    size : int
        Its size in bytes.
    version : int
        GGUF version (2 or 3; both have the same layout).
    alignment : int
        Tensors start at multiples of this, counted from `data_offset`.
    data_offset : int
        Byte offset of the tensor data.
    keys : tuple of GgufKey
        Where each key/value pair lies, in file order.
    metadata : mapping of str to scalar or tuple
        Values of all keys, except of long arrays and of arrays of strings (the vocabulary).
    tensors : tuple of GgufTensor
        The tensor table in file order.
    header_digest : str
        Hex BLAKE2b-256 of the first `data_offset` bytes.
    """

    path: Path
    size: int
    version: int
    alignment: int
    data_offset: int
    keys: tuple[GgufKey, ...]
    metadata: Mapping[str, KeyValue] = field(hash=False)
    tensors: tuple[GgufTensor, ...]
    header_digest: str


class _Cursor:
    """Steps through the start of a file that is read in growing pieces, and refuses to step over its end."""

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self.descriptor = descriptor
        self.path = path
        self.size = size
        self.limit = min(size, _MAX_HEADER_BYTES)
        self.buffer = bytearray()
        self.position = 0

    def fail(self, what: str) -> NoReturn:
        """Raise ModelFormatError for something that the header says."""
        raise ModelFormatError(f"{self.path} is not a valid GGUF file: {what}.", _DAMAGED)

    def need(self, nbytes: int, what: str) -> None:
        """Make sure that `nbytes` more bytes are in the buffer."""
        end = self.position + nbytes
        if end <= len(self.buffer):
            return
        if end > self.limit:
            if end <= self.size:
                self.fail(f"{what} makes the header larger than {_MAX_HEADER_BYTES >> 20} MiB")
            self.fail(f"the file ends ({self.size} bytes) in the middle of {what}")
        target = min(self.limit, max(end, 2 * len(self.buffer), _FIRST_READ))
        while len(self.buffer) < target:
            piece = os.pread(self.descriptor, target - len(self.buffer), len(self.buffer))
            if not piece:
                self.fail(f"the file became shorter than {self.size} bytes while it was read")
            self.buffer += piece

    def skip(self, nbytes: int, what: str) -> None:
        """Step over `nbytes` bytes."""
        self.need(nbytes, what)
        self.position += nbytes

    def u32(self, what: str) -> int:
        """Next unsigned 32-bit integer."""
        self.need(4, what)
        value: int = _U32.unpack_from(self.buffer, self.position)[0]
        self.position += 4
        return value

    def u64(self, what: str) -> int:
        """Next unsigned 64-bit integer."""
        self.need(8, what)
        value: int = _U64.unpack_from(self.buffer, self.position)[0]
        self.position += 8
        return value

    def text(self, what: str) -> str:
        """Next length-prefixed string."""
        length = self.u64(what)
        self.need(length, what)
        start, self.position = self.position, self.position + length
        try:
            return self.buffer[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8 text")

    def name(self, what: str) -> str:
        """Next length-prefixed string that names something: not empty, not absurdly long."""
        value = self.text(what)
        if not value or len(value) > _LONGEST_NAME:
            self.fail(f"{what} is {len(value)} characters long")
        return value

    def count(self, smallest: int, what: str) -> int:
        """Next 64-bit count of things of at least `smallest` bytes each, checked against what is left of the file."""
        value = self.u64(what)
        if value * smallest > self.size - self.position:
            self.fail(f"it claims {value} {what}, more than fit into its {self.size} bytes")
        return value

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` length-prefixed strings."""
        unpack, buffer, position, loaded = _U64.unpack_from, self.buffer, self.position, len(self.buffer)
        for _ in range(count):
            if position + 8 > loaded:
                self.position = position
                self.need(8, what)
                loaded = len(buffer)
            position += 8 + unpack(buffer, position)[0]
        self.position = position
        self.need(0, what)


def _directory_hint(path: Path) -> str:
    """Name the models in a directory that was given instead of one of them."""
    try:
        entries = os.listdir(path)
    except (OSError, ValueError):
        return ""
    inside = sorted(entry for entry in entries if entry.endswith(".gguf"))
    if not inside and "config.json" in entries:
        return " It holds a checkpoint, which vLLM can load (--engine vllm)."
    return f" It holds {', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}." if inside else ""


def read_header(path: Path) -> GgufLayout:
    """Read the header of one GGUF file.

    Parameters
    ----------
    path : Path
        A GGUF file; of a split model, any one of its files.

    Returns
    -------
    GgufLayout
        Keys and tensor table. The file is closed and not mapped; no tensor data was read.

    Raises
    ------
    ModelNotFoundError
        `path` does not exist, is a directory or cannot be read.
    ModelFormatError
        Not GGUF, of an unsupported version or byte order, damaged, or shorter than its tensors need.
    UnsupportedModelError
        A tensor has a storage type that is not known here.
    """
    with opened(path, _NAME_THE_FILE + _directory_hint(path)) as (descriptor, size):
        cursor = _Cursor(descriptor, path, size)
        version, tensor_count, key_count = _read_preamble(cursor)
        keys, metadata = _read_keys(cursor, key_count)
        alignment = _alignment(cursor, metadata)
        table = _read_table(cursor, tensor_count)
        data_offset = cursor.position
        if table:
            data_offset = _align_up(data_offset, alignment)
            if data_offset < size:  # a file of empty tensors may end without the padding
                cursor.skip(data_offset - cursor.position, "the padding after the tensor table")
        tensors = _place(cursor, table, data_offset, alignment)
        digest = hashlib.blake2b(memoryview(cursor.buffer)[:data_offset], digest_size=32).hexdigest()
    return GgufLayout(
        path=path,
        size=size,
        version=version,
        alignment=alignment,
        data_offset=data_offset,
        keys=keys,
        metadata=MappingProxyType(metadata),
        tensors=tensors,
        header_digest=digest,
    )


def _align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    path = cursor.path
    cursor.need(min(4, cursor.size), "its magic number")
    magic = bytes(cursor.buffer[:4])
    if magic != MAGIC:
        shown = magic.decode("latin-1") if magic.isalnum() else magic.hex(" ")
        raise ModelFormatError(
            f"{path} is not a GGUF file: it starts with '{shown}', not with 'GGUF'.",
            "Name a model in GGUF format; llama.cpp's convert_hf_to_gguf.py converts Hugging Face models.",
        )
    cursor.position = 4
    version = cursor.u32("its version")
    if version and not version & 0xFFFF:
        raise ModelFormatError(
            f"{path} is a big-endian GGUF file.", "Convert it to little-endian, e.g. with gguf_convert_endian.py."
        )
    if version not in SUPPORTED_VERSIONS:
        raise ModelFormatError(
            f"{path} has GGUF version {version}; versions 2 and 3 are supported.",
            "Convert the model again with a current llama.cpp.",
        )
    tensor_count = cursor.count(_MIN_TENSOR_BYTES, "tensors")
    key_count = cursor.count(_MIN_KEY_BYTES, "keys")
    return version, tensor_count, key_count


def _read_keys(cursor: _Cursor, count: int) -> tuple[tuple[GgufKey, ...], dict[str, KeyValue]]:
    keys: list[GgufKey] = []
    seen: set[str] = set()
    metadata: dict[str, KeyValue] = {}
    for index in range(count):
        start = cursor.position
        name = cursor.name(f"the name of key {index}")
        if name in seen:
            cursor.fail(f"key '{name}' occurs twice")
        seen.add(name)
        value = _read_value(cursor, name)
        if value is not None:
            metadata[name] = value
        keys.append(GgufKey(name=name, offset=start, nbytes=cursor.position - start))
    return tuple(keys), metadata


def _read_value(cursor: _Cursor, name: str) -> KeyValue | None:
    """Return the value of a key, or None for an array that is not worth keeping."""
    what = f"the value of key '{name}'"
    kind = cursor.u32(what)
    if kind == _STRING:
        return cursor.text(what)
    if kind != _ARRAY:
        return _read_scalars(cursor, kind, 1, what)[0]
    element = cursor.u32(what)
    if element == _STRING:
        cursor.skip_strings(cursor.count(8, f"strings in key '{name}'"), what)
        return None
    code = _SCALAR_CODES.get(element)
    if code is None:
        cursor.fail(f"{what} is an array of unknown type {element}")
    width = struct.calcsize(f"<{code}")
    length = cursor.count(width, f"numbers in key '{name}'")
    if length > _LONGEST_KEPT_ARRAY:
        cursor.skip(length * width, what)
        return None
    return _read_scalars(cursor, element, length, what)


def _read_scalars(cursor: _Cursor, kind: int, count: int, what: str) -> tuple[Scalar, ...]:
    code = _SCALAR_CODES.get(kind)
    if code is None:
        cursor.fail(f"{what} has unknown type {kind}")
    layout = struct.Struct(f"<{count}{code}")
    cursor.need(layout.size, what)
    values = layout.unpack_from(cursor.buffer, cursor.position)
    cursor.position += layout.size
    return values


def _alignment(cursor: _Cursor, metadata: Mapping[str, KeyValue]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment.bit_count() != 1:
        cursor.fail(f"general.alignment is {alignment!r}, not a power of two up to {_MAX_ALIGNMENT}")
    return alignment


def _read_table(cursor: _Cursor, count: int) -> list[GgufTensor]:
    """Read the tensor table, with offsets still relative to the data."""
    tensors: list[GgufTensor] = []
    seen: set[str] = set()
    for index in range(count):
        name = cursor.name(f"the name of tensor {index}")
        if name in seen:
            cursor.fail(f"tensor '{name}' occurs twice")
        seen.add(name)
        what = f"the table row of tensor '{name}'"
        dims = cursor.u32(what)
        if dims > _MAX_DIMS:
            cursor.fail(f"tensor '{name}' has {dims} dimensions")
        shape = tuple(cursor.u64(what) for _ in range(dims))
        type_id = cursor.u32(what)
        offset = cursor.u64(what)
        if type_id not in TENSOR_TYPES:
            raise UnsupportedModelError(
                f"{cursor.path}: tensor '{name}' has storage type {type_id}, which is not known here.",
                "Use a model quantised to a common type (e.g. Q4_K_M); if the file should have one, it is damaged.",
            )
        type_name, block, block_bytes = TENSOR_TYPES[type_id]
        row = shape[0] if shape else 1
        if row % block:
            cursor.fail(f"tensor '{name}' has rows of {row} elements, not a multiple of {block} as {type_name} needs")
        nbytes = math.prod(shape) // block * block_bytes
        tensors.append(
            GgufTensor(name=name, type_id=type_id, type_name=type_name, shape=shape, offset=offset, nbytes=nbytes)
        )
    return tensors


def _place(cursor: _Cursor, table: list[GgufTensor], data_offset: int, alignment: int) -> tuple[GgufTensor, ...]:
    """Make offsets absolute and check that all tensors lie in the file, aligned and apart."""
    for tensor in table:
        if tensor.offset % alignment:
            cursor.fail(f"tensor '{tensor.name}' starts at {tensor.offset}, not a multiple of {alignment}")
    placed = tuple(replace(tensor, offset=data_offset + tensor.offset) for tensor in table)
    by_place = sorted((tensor for tensor in placed if tensor.nbytes), key=lambda tensor: tensor.offset)
    for before, after in pairwise(by_place):
        if before.offset + before.nbytes > after.offset:
            cursor.fail(f"tensors '{before.name}' and '{after.name}' overlap")
    expected = max((tensor.offset + tensor.nbytes for tensor in by_place), default=0)
    if expected > cursor.size:
        raise ModelFormatError(
            f"{cursor.path} is truncated: its tensors need {expected} bytes, the file has {cursor.size}.", _DAMAGED
        )
    return placed
