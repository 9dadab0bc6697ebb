"""Reads the headers of a Hugging Face checkpoint: configuration, index and the tensor table of every file.

A safetensors file is eight bytes with the length of its header, the header (JSON) and the data. Every length, offset
and name is checked against the file before it is used: a damaged checkpoint is refused by name. No tensor data is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeGuard

from expertier.catalog.files import opened, read_at
from expertier.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError

CONFIG_NAME: Final = "config.json"
INDEX_NAME: Final = "model.safetensors.index.json"

# Storage types of the format and their bits per element.
DTYPES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "I64": 64,
        "U64": 64,
        "F64": 64,
        "C64": 64,
    }
)

_MAX_DIMS: Final = 32
_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_MAX_JSON_BYTES: Final = 256 << 20  # the largest index in use has about 20 MB
_SHARD_NAME: Final = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors", re.DOTALL)
OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt")

_DAMAGED: Final = "The file is damaged or its download was cut short: fetch it again."
_ONE_MODEL: Final = "Put the files of one and the same model into the directory."
NAME_THE_DIRECTORY: Final = "Name the directory of a Hugging Face checkpoint, with config.json and *.safetensors in it."


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes
    ----------
    name : str
        Tensor name, e.g. ``model.layers.0.mlp.gate.weight``.
    dtype : str
        Storage type as the format names it, e.g. ``BF16``.
    shape : tuple of int
        Slowest dimension first.
    file : Path
        The file that holds it.
    offset : int
        Absolute byte offset in `file`.
    nbytes : int
        Bytes of data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What the header of one safetensors file says.

    Attributes
    ----------
    path : Path
        The file.
    size : int
        Its size in bytes.
    tensors : tuple of StoredTensor
        In the order of their data.
    header_digest : str
        Hex BLAKE2b-256 of everything before the data.
    """

    path: Path
    size: int
    tensors: tuple[StoredTensor, ...]
    header_digest: str


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """The headers of a whole checkpoint.

    Attributes
    ----------
    directory : Path
        Where it lies.
    config : mapping of str to object
        Content of ``config.json``.
    files : tuple of WeightFile
        The files an engine loads, by name.
    """

    directory: Path
    config: Mapping[str, Any] = field(hash=False)
    files: tuple[WeightFile, ...]


def read_layout(path: str | os.PathLike[str]) -> CheckpointLayout:
    """Read configuration, index and headers of a checkpoint.

    Parameters
    ----------
    path : path
        The directory, or any of ``config.json``, the index and the weight files in it.

    Returns
    -------
    CheckpointLayout
        Every tensor exactly once; all files are closed again.

    Raises
    ------
    ModelNotFoundError
        The directory, its configuration, or a file that its index names is missing or cannot be read.
    ModelFormatError
        A file is damaged, truncated or not what its name says, or index and files contradict each other.
    UnsupportedModelError
        The weights are in another format than safetensors, or of an unknown storage type.
    """
    directory = _directory_of(Path(path))
    entries = _listing(directory)
    if CONFIG_NAME not in entries:
        named = [name for name in sorted(entries) if name.endswith(".gguf")]
        hint = f"For llama.cpp, name {named[0]} itself." if named else NAME_THE_DIRECTORY
        raise ModelNotFoundError(f"{directory} has no {CONFIG_NAME}.", hint)
    config = read_json(directory / CONFIG_NAME)
    placed = _index(directory / INDEX_NAME) if INDEX_NAME in entries else None
    names = sorted(set(placed.values())) if placed is not None else _unlisted(directory, entries)
    files = tuple(_shard(directory / name, indexed=placed is not None) for name in names)
    _check_names(directory, files, placed)
    return CheckpointLayout(directory=directory, config=MappingProxyType(config), files=files)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict
        Its content.

    Raises
    ------
    ModelNotFoundError
        It cannot be read.
    ModelFormatError
        It is not JSON, not an object, or absurdly large.
    """
    with opened(path, NAME_THE_DIRECTORY) as (descriptor, size):
        if size > _MAX_JSON_BYTES:
            raise ModelFormatError(f"{path} has {size} bytes, far too many for what it should hold.", _DAMAGED)
        text = _read(descriptor, path, size, 0)
    return _parse(path, "", text)


def read_header(path: Path) -> WeightFile:
    """Read the header of one safetensors file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    WeightFile
        Its tensor table.

    Raises
    ------
    ModelNotFoundError
        It cannot be read.
    ModelFormatError
        It is not a safetensors file, damaged, or shorter or longer than its tensors need.
    UnsupportedModelError
        A tensor has a storage type that is not known here.
    """
    with opened(path, NAME_THE_DIRECTORY) as (descriptor, size):
        start = _read(descriptor, path, min(size, 8), 0)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ModelFormatError(f"{path} is a pointer of Git LFS, not the weights.", "Fetch them: git lfs pull.")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelFormatError(
                f"{path} is not a safetensors file or is truncated: its header should have {length} bytes, "
                f"the file has {size}.",
                _DAMAGED,
            )
        text = _read(descriptor, path, length, 8)
    entries = _parse(path, "its header", text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ModelFormatError(f"{path}: the metadata of its header are not an object.", _DAMAGED)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    digest = hashlib.blake2b(start + text, digest_size=32).hexdigest()
    return WeightFile(path=path, size=size, tensors=_placed(path, tensors, 8 + length, size), header_digest=digest)


# ---- one file --------------------------------------------------------------------------------------------------------


def _read(descriptor: int, path: Path, length: int, offset: int) -> bytes:
    data = read_at(descriptor, length, offset)
    if len(data) < length:
        raise ModelFormatError(f"{path} became shorter while it was read.", "Do not change a model while it is used.")
    return data


def _parse(path: Path, what: str, text: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no key occurs twice."""
    where = f"{path}: {what}" if what else str(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ModelFormatError(f"{where} names '{_shown(twice)}' twice.", _DAMAGED)
        return content

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{where} is not JSON ({error}).", _DAMAGED) from error
    if not isinstance(content, dict):
        raise ModelFormatError(f"{where} is not a JSON object.", _DAMAGED)
    return content


def _tensor(path: Path, name: str, entry: object, start: int) -> StoredTensor:
    where = f"{path}: tensor '{_shown(name)}'"
    if not isinstance(entry, dict):
        raise ModelFormatError(f"{where} is not described by an object.", _DAMAGED)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise ModelFormatError(f"{where} has no valid dtype, shape and data_offsets.", _DAMAGED)
    bits = DTYPES.get(dtype)
    if bits is None:
        raise UnsupportedModelError(
            f"{where} has storage type {_shown(dtype)}, which is not known here.",
            "Use a checkpoint in a common type; if the file should have one, it is damaged.",
        )
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise ModelFormatError(f"{where} has shape {_shown(str(shape))} of {dtype}, but {end - begin} bytes.", _DAMAGED)
    return StoredTensor(name=name, dtype=dtype, shape=tuple(shape), file=path, offset=start + begin, nbytes=end - begin)


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MAX_DIMS:
        return False
    return all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _shown(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _placed(path: Path, tensors: Sequence[StoredTensor], start: int, size: int) -> tuple[StoredTensor, ...]:
    """Sort by place; the data must begin after the header, have no gaps and overlaps, and end with the file."""
    ordered = tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)))
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise ModelFormatError(
                f"{path}: tensors '{_shown(before.name)}' and '{_shown(after.name)}' overlap.", _DAMAGED
            )
    end = start
    for tensor in ordered:
        if tensor.offset != end:
            raise ModelFormatError(
                f"{path}: {tensor.offset - end} bytes before tensor '{_shown(tensor.name)}' belong to nothing.",
                _DAMAGED,
            )
        end += tensor.nbytes
    if end > size:
        raise ModelFormatError(f"{path} is truncated: its tensors need {end} bytes, the file has {size}.", _DAMAGED)
    if end < size:
        raise ModelFormatError(
            f"{path} is longer than its tensors: they need {end} bytes, the file has {size}.", _DAMAGED
        )
    return ordered


# ---- the directory ---------------------------------------------------------------------------------------------------


def _directory_of(path: Path) -> Path:
    try:
        if path.is_dir():
            return path
        if path.exists() and path.name.endswith((".json", ".safetensors")):
            return path.parent
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"The model {path} cannot be opened: {error}.", NAME_THE_DIRECTORY) from error
    if exists:
        raise ModelNotFoundError(f"{path} is not a checkpoint directory.", NAME_THE_DIRECTORY)
    raise ModelNotFoundError(
        f"There is no model {path}.",
        f"{NAME_THE_DIRECTORY} Fetch a model of the Hugging Face hub with `hf download NAME --local-dir DIRECTORY`.",
    )


def _listing(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except OSError as error:
        raise ModelNotFoundError(f"The directory {directory} cannot be read: {error.strerror}.") from error


def _index(path: Path) -> dict[str, str]:
    """Tensor name to file name, as the index of a sharded checkpoint says."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{path} has no weight_map.", _DAMAGED)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
            raise ModelFormatError(
                f"{path} places tensor '{_shown(name)}' in {_shown(repr(file))}, which is not a file of the directory.",
                _DAMAGED,
            )
    return weight_map


def _unlisted(directory: Path, entries: set[str]) -> list[str]:
    """Names of the weight files of a checkpoint without an index."""
    names = sorted(name for name in entries if name.endswith(".safetensors"))
    # The same weights a second time, in the format of Mistral's own engine.
    names = [name for name in names if not name.startswith("consolidated")] or names
    if not names:
        others = sorted(name for name in entries if name.endswith(OTHER_WEIGHTS))
        if others:
            raise UnsupportedModelError(
                f"{directory} holds its weights in {others[0]}, a format that can only be read as a whole.",
                "Fetch or convert the checkpoint in safetensors format (transformers: save_pretrained).",
            )
        raise ModelNotFoundError(f"{directory} holds no weights.", NAME_THE_DIRECTORY)
    for name in names:
        match = _SHARD_NAME.fullmatch(name)
        for number in range(1, int(match["count"]) + 1 if match else 0):
            assert match is not None
            sibling = f"{match['prefix']}-{number:05}-of-{match['count']}.safetensors"
            if sibling not in entries:
                raise ModelNotFoundError(
                    f"{directory} holds {name}, but {sibling} is missing.",
                    "Fetch the missing file into the same directory.",
                )
    return names


def _shard(path: Path, *, indexed: bool) -> WeightFile:
    try:
        return read_header(path)
    except ModelNotFoundError as error:
        if not indexed:
            raise
        raise ModelNotFoundError(
            f"{INDEX_NAME} names {path.name}, which is missing: {error.problem}",
            "Fetch the missing file into the same directory.",
        ) from error


def _check_names(directory: Path, files: Sequence[WeightFile], placed: Mapping[str, str] | None) -> None:
    """Every tensor exactly once, and where the index says."""
    holder: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in holder:
                raise ModelFormatError(
                    f"{directory}: tensor '{_shown(tensor.name)}' is both in {holder[tensor.name]} and in "
                    f"{file.path.name}.",
                    _ONE_MODEL,
                )
            holder[tensor.name] = file.path.name
    for name, stated in (placed or {}).items():
        if holder.get(name) != stated:
            found = f"it is in {holder[name]}" if name in holder else "no file has it"
            raise ModelFormatError(
                f"{directory / INDEX_NAME} places tensor '{_shown(name)}' in {stated}, but {found}.", _ONE_MODEL
            )
