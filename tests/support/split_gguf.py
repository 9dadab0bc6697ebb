"""Splits a GGUF file the way llama.cpp's own tool does: all keys in the first file, tensors dealt out in runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expertier.catalog.gguf import GgufLayout, GgufTensor, read_layout
from support.raw_gguf import I32, U16, Value, key_value, tensor_row


def split_gguf(source: Path, prefix: Path, files: int) -> Path:
    """Write ``PREFIX-00001-of-0000N.gguf`` and so on, and return the first; the source stays.

    Raises
    ------
    ValueError
        More files than tensors.
    """
    (layout,) = read_layout(source)
    tensors = sorted(layout.tensors, key=lambda tensor: tensor.offset)
    if not 1 <= files <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot be split into {files} files")
    raw = source.read_bytes()
    paths = [prefix.with_name(f"{prefix.name}-{number + 1:05}-of-{files:05}.gguf") for number in range(files)]
    for number, run in enumerate(_runs(tensors, files)):
        own = {
            "split.no": Value(U16, number),
            "split.count": Value(U16, files),
            "split.tensors.count": Value(I32, len(tensors)),
        }
        pairs = [key_value(name, value) for name, value in own.items()]
        if number == 0:
            pairs += [raw[key.offset : key.offset + key.nbytes] for key in layout.keys]
        paths[number].write_bytes(_file(layout, raw, pairs, run, layout.alignment if number == 0 else 32))
    return paths[0]


def _runs(tensors: Sequence[GgufTensor], files: int) -> list[list[GgufTensor]]:
    """Deal tensors out in order, so that the files are about equally large and none is empty."""
    total = sum(tensor.nbytes for tensor in tensors)
    runs: list[list[GgufTensor]] = [[]]
    done = 0
    for index, tensor in enumerate(tensors):
        missing = files - len(runs)
        full = done >= total * len(runs) / files or len(tensors) - index <= missing
        if runs[-1] and missing and full:
            runs.append([])
        runs[-1].append(tensor)
        done += tensor.nbytes
    return runs


def _file(layout: GgufLayout, raw: bytes, pairs: Sequence[bytes], run: Sequence[GgufTensor], alignment: int) -> bytes:
    table, data = b"", bytearray()
    for tensor in run:
        table += tensor_row(tensor.name, tensor.type_id, tensor.shape, len(data))
        data += raw[tensor.offset : tensor.offset + tensor.nbytes]
        data += bytes(-len(data) % alignment)
    counts = len(run).to_bytes(8, "little") + len(pairs).to_bytes(8, "little")
    header = b"GGUF" + layout.version.to_bytes(4, "little") + counts + b"".join(pairs) + table
    return header + bytes(-len(header) % alignment) + bytes(data)
