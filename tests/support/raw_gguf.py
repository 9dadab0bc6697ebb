"""Builds GGUF files byte by byte, valid or wrong on purpose, for tests of the header parser."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
TYPE_F32, TYPE_F16, TYPE_Q8_0, TYPE_Q4_K, TYPE_BF16, TYPE_MXFP4 = 0, 1, 8, 12, 30, 39
BLOCKS = {
    TYPE_F32: (1, 4),
    TYPE_F16: (1, 2),
    TYPE_Q8_0: (32, 34),
    TYPE_Q4_K: (256, 144),
    TYPE_BF16: (1, 2),
    TYPE_MXFP4: (32, 17),
    15: (256, 292),
    26: (1, 4),
}


@dataclass(frozen=True)
class Value:
    """A typed value; `kind` is the type of the elements if `value` is a list."""

    kind: int
    value: object


@dataclass(frozen=True)
class Tensor:
    """A tensor with the bytes to write; `data` of None means bytes made from the name."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        block, block_bytes = BLOCKS[self.type_id]
        return math.prod(self.shape) // block * block_bytes

    def content(self) -> bytes:
        if self.data is not None:
            return self.data
        seed = self.name.encode()
        return (seed * (self.nbytes // len(seed) + 1))[: self.nbytes]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def _one(kind: int, value: object) -> bytes:
    if kind == STRING:
        assert isinstance(value, str | bytes)
        return text(value)
    return struct.pack("<" + _CODES[kind], value)


def key_value(name: str, item: Value) -> bytes:
    if isinstance(item.value, list):
        elements = b"".join(_one(item.kind, element) for element in item.value)
        return text(name) + struct.pack("<IIQ", ARRAY, item.kind, len(item.value)) + elements
    return text(name) + struct.pack("<I", item.kind) + _one(item.kind, item.value)


def tensor_row(name: str, type_id: int, shape: Sequence[int], offset: int) -> bytes:
    """Return one row of the tensor table; `offset` counts from the start of the data."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def build(keys: Mapping[str, Value], tensors: Sequence[Tensor], *, version: int = 3, alignment: int = 32) -> bytes:
    """Return a whole GGUF file."""
    pairs = b"".join(key_value(name, item) for name, item in keys.items())
    table, data = b"", b""
    for tensor in tensors:
        table += tensor_row(tensor.name, tensor.type_id, tensor.shape, len(data))
        data += tensor.content()
        data += bytes(-len(data) % alignment)
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + pairs + table
    return header + bytes(-len(header) % alignment) + data


def moe_keys(*, layers: int = 2, experts: int = 4, top_k: object = 2, vocabulary: int = 50) -> dict[str, Value]:
    """Keys of a small mixture of experts."""
    used = Value(U32, top_k)
    return {
        "general.architecture": Value(STRING, "qwen3moe"),
        "general.name": Value(STRING, "raw"),
        "qwen3moe.block_count": Value(U32, layers),
        "qwen3moe.expert_count": Value(U32, experts),
        "qwen3moe.expert_used_count": used,
        "qwen3moe.rope.freq_base": Value(F32, 10000.0),
        "tokenizer.ggml.tokens": Value(STRING, [f"token{index}" for index in range(vocabulary)]),
        "tokenizer.ggml.token_type": Value(I32, [1] * vocabulary),
        "tokenizer.ggml.add_bos_token": Value(BOOL, False),
    }


def moe_tensors(
    *, layers: int = 2, experts: int = 4, dense: int = 0, columns: int = 32, rows: int = 8, type_id: int = TYPE_F16
) -> list[Tensor]:
    """Tensors of a small mixture of experts, in an order unlike that of execution, the first `dense` layers dense."""
    tensors = [Tensor("token_embd.weight", TYPE_F32, (columns, 50))]
    for layer in range(layers):
        prefix = f"blk.{layer}."
        tensors.append(Tensor(prefix + "attn_norm.weight", TYPE_F32, (columns,)))
        if layer < dense:
            tensors.append(Tensor(prefix + "ffn_up.weight", TYPE_F16, (columns, rows)))
            continue
        tensors += [
            Tensor(prefix + "ffn_down_exps.weight", TYPE_F16, (rows, columns, experts)),
            Tensor(prefix + "ffn_gate_exps.weight", type_id, (columns, rows, experts)),
            Tensor(prefix + "ffn_gate_inp.weight", TYPE_F32, (columns, experts)),
            Tensor(prefix + "ffn_gate_exps.bias", TYPE_F32, (rows, experts)),
            Tensor(prefix + "ffn_up_shexp.weight", TYPE_F16, (columns, rows)),
            Tensor(prefix + "ffn_up_chexps.weight", TYPE_F16, (columns, rows, 2)),
            Tensor(prefix + "ffn_up_exps.weight", type_id, (columns, rows, experts)),
        ]
    return tensors


def split(keys: Mapping[str, Value], tensors: Sequence[Tensor], parts: int, *, alignment: int = 32) -> list[bytes]:
    """Return the files of a split model; tensors are dealt out in runs."""
    size = -(-len(tensors) // parts)
    files = []
    for number in range(parts):
        own = {
            "split.no": Value(U16, number),
            "split.count": Value(U16, parts),
            "split.tensors.count": Value(I32, len(tensors)),
        }
        head = dict(keys) if number == 0 else {}
        run = tensors[number * size : (number + 1) * size]
        files.append(build(head | own, run, alignment=alignment if number == 0 else 32))
    return files
