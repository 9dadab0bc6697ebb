"""The file format of recorded routes.

A trace holds routes, positions and request numbers, on request token ids and samples of the routers' inputs, and never
text. It is made of checksummed blocks, so that a recorder that is killed leaves everything up to its last second.

File format, version 1 (all integers little-endian)
---------------------------------------------------
==========  =====================================================================================================
8 bytes     ``EXPTRACE``
u32, u32    version; length of the header
header      JSON: see :class:`TraceHeader`
u32         CRC-32 of everything before it
blocks      until the end of the file, each with the frame
            ``kind (4 bytes), CRC-32 of the payload as stored (u32), stored bytes (u64), raw bytes (u64), CRC-32 of
            these (u32)`` and its payload, compressed with zlib
==========  =====================================================================================================

Kinds: ``STEP`` routes of some steps; ``NOTE`` a JSON object of measurements, merged into those before; ``DONE`` a JSON
object with the number of blocks, steps and tokens before it and a CRC-32 over the checksums of all blocks. A file
without ``DONE`` was not closed.

Payload of ``STEP``: five u32 (steps S, tokens T, calls C, routes R, hidden samples H), then columns without gaps:

=================================  ==========================  ==================================================
phase, step_tokens                 u8 (S), u32 (S)             0 decode, 1 prefill; tokens of the step
request, position                  u32 (T), i32 (T)            of every token; position -1 where unknown
token_id                           i32 (T)                     only if the header says ``tokens``
call_step, call_layer, call_rows   u32, u16, u32 (C each)      a layer's turn: step within the block, position of the
                                                               layer in the header, tokens it ran for
experts                            u8 or u16 (R)               rows of top_k, call after call; u16 if any layer has
                                                               more than 256 experts
weights                            f16 (R)                     only if the header says ``weights``; NaN where unknown
hidden_call, hidden_row, hidden    u32, u32 (H), f16 (H x n)   router inputs; n is the header's ``hidden_size``
=================================  ==========================  ==================================================

A layer that ran for fewer rows than its step has tokens ran for the last of them.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from expertier.errors import TraceFormatError

VERSION: Final = 1
MAGIC: Final = b"EXPTRACE"
STEP, NOTE, DONE = b"STEP", b"NOTE", b"DONE"
FRAME: Final = struct.Struct("<4sIQQI")
COUNTS: Final = struct.Struct("<5I")
MOST_HEADER = 64 << 20
MOST_RAW = 1 << 30  # a block of a recorder has a few megabytes; more is an attack or damage
REMEDY = "Record the trace again."

DECODE, PREFILL = 0, 1


@dataclass(frozen=True, kw_only=True)
class TraceLayer:
    """A layer with routed experts.

    Attributes
    ----------
    layer : int
        Index of the transformer layer.
    experts, top_k : int
        Routed experts; experts per token.
    slot_bytes : int
        Memory of one resident expert.
    read_bytes : tuple of int
        Bytes read to load an expert: one number for all, or one per expert (alignment may make them differ).
    stages : int
        Parts in which an expert arrives.
    """

    layer: int
    experts: int
    top_k: int
    slot_bytes: int
    read_bytes: tuple[int, ...]
    stages: int = 1

    def load_bytes(self) -> NDArray[np.int64]:
        """Bytes read per expert, shape ``(experts,)``."""
        return np.broadcast_to(np.asarray(self.read_bytes, np.int64), (self.experts,))


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """What a trace is of.

    Attributes
    ----------
    fingerprint, architecture, model : str
        Identity, architecture and file name of the model.
    engine : str
        What ran the model.
    layers : tuple of TraceLayer
        Layers with routed experts, ascending.
    weights, tokens : bool
        Whether gate weights and token ids were recorded.
    hidden_size : int
        Width of the sampled router inputs; 0 if there are none.
    routers : str
        Digest of the router weights (:func:`expertier.catalog.routers.routers_digest`), empty if unknown.
    """

    fingerprint: str
    architecture: str
    layers: tuple[TraceLayer, ...]
    model: str = ""
    engine: str = ""
    weights: bool = False
    tokens: bool = False
    hidden_size: int = 0
    routers: str = ""

    @cached_property
    def position_of(self) -> dict[int, int]:
        """Layer index to its place in :attr:`layers`."""
        return {layer.layer: place for place, layer in enumerate(self.layers)}

    @property
    def expert_dtype(self) -> np.dtype[Any]:
        """Type of the stored expert numbers."""
        return np.dtype("u1" if max(layer.experts for layer in self.layers) <= 256 else "<u2")

    @property
    def total_bytes(self) -> int:
        """Memory of all experts."""
        return sum(layer.experts * layer.slot_bytes for layer in self.layers)

    @property
    def total_experts(self) -> int:
        """Number of all experts."""
        return sum(layer.experts for layer in self.layers)

    def encode(self) -> bytes:
        """Return the beginning of a file."""
        body = json.dumps(asdict(self), separators=(",", ":")).encode()
        start = MAGIC + struct.pack("<II", VERSION, len(body)) + body
        return start + struct.pack("<I", zlib.crc32(start))


@dataclass(frozen=True, kw_only=True)
class TraceBlock:
    """Some steps in columns; see the file format for shapes and types."""

    header: TraceHeader
    phase: NDArray[np.uint8]
    step_tokens: NDArray[np.uint32]
    request: NDArray[np.uint32]
    position: NDArray[np.int32]
    token_id: NDArray[np.int32] | None
    call_step: NDArray[np.uint32]
    call_layer: NDArray[np.uint16]
    call_rows: NDArray[np.uint32]
    experts: NDArray[Any]
    weights: NDArray[np.float16] | None
    hidden_call: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    hidden_row: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    hidden: NDArray[np.float16] = field(default_factory=lambda: np.empty((0, 0), np.float16))

    @cached_property
    def call_starts(self) -> NDArray[np.int64]:
        """Where each call's routes begin in :attr:`experts`, and their end, shape ``(calls + 1,)``."""
        top_k = np.array([layer.top_k for layer in self.header.layers])
        sizes = self.call_rows.astype(np.int64) * top_k[self.call_layer]
        return np.concatenate([[0], np.cumsum(sizes)])

    def routes(self, call: int) -> NDArray[Any]:
        """Experts of a call, shape ``(rows, top_k)``."""
        start, stop = self.call_starts[call : call + 2]
        return self.experts[start:stop].reshape(-1, self.header.layers[self.call_layer[call]].top_k)

    def encode(self) -> bytes:
        """Return the payload of a ``STEP`` block, not compressed."""
        counts = (len(self.phase), len(self.request), len(self.call_step), len(self.experts), len(self.hidden_call))
        columns: list[tuple[Any, str]] = [
            (self.phase, "u1"),
            (self.step_tokens, "<u4"),
            (self.request, "<u4"),
            (self.position, "<i4"),
            *([(self.token_id, "<i4")] if self.header.tokens else []),
            (self.call_step, "<u4"),
            (self.call_layer, "<u2"),
            (self.call_rows, "<u4"),
            (self.experts, self.header.expert_dtype.str),
            *([(self.weights, "<f2")] if self.header.weights else []),
            (self.hidden_call, "<u4"),
            (self.hidden_row, "<u4"),
            (self.hidden, "<f2"),
        ]
        return COUNTS.pack(*counts) + b"".join(np.ascontiguousarray(data, kind).tobytes() for data, kind in columns)


@dataclass
class TraceCounts:
    """What a reader or recorder has seen: blocks, steps and tokens, requests, and a CRC-32 over all checksums."""

    blocks: int = 0
    steps: int = 0
    tokens: int = 0
    requests: int = 0
    crc: int = 0

    def add(self, crc: int, *, steps: int = 0, tokens: int = 0) -> None:
        """Count a block."""
        self.blocks += 1
        self.steps += steps
        self.tokens += tokens
        self.crc = zlib.crc32(struct.pack("<I", crc), self.crc)

    def end_mark(self) -> dict[str, int]:
        """Return the contents of the ``DONE`` block."""
        return {"blocks": self.blocks, "steps": self.steps, "tokens": self.tokens, "crc": self.crc}


def frame(kind: bytes, raw: bytes) -> tuple[bytes, int]:
    """Pack a block; returns it and the checksum of its payload."""
    payload = zlib.compress(raw, 1)
    crc = zlib.crc32(payload)
    start = FRAME.pack(kind, crc, len(payload), len(raw), 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(start)) + payload, crc


def decode_block(header: TraceHeader, raw: bytes, path: Path) -> TraceBlock:
    """Unpack the payload of a ``STEP`` block; nothing in it is believed.

    Raises
    ------
    TraceFormatError
        The columns contradict each other or the header.
    """
    if len(raw) < COUNTS.size:
        raise TraceFormatError(f"A block of {path} is too short.", REMEDY)
    steps, tokens, calls, routes, hidden = COUNTS.unpack_from(raw)
    place = COUNTS.size

    def take(kind: Any, count: int) -> Any:
        nonlocal place
        dtype = np.dtype(kind)
        start, place = place, place + dtype.itemsize * count
        if place > len(raw):
            raise TraceFormatError(f"A block of {path} is shorter than its columns.", REMEDY)
        return np.frombuffer(raw, dtype, count, start)

    block = TraceBlock(
        header=header,
        phase=take("u1", steps),
        step_tokens=take("<u4", steps),
        request=take("<u4", tokens),
        position=take("<i4", tokens),
        token_id=take("<i4", tokens) if header.tokens else None,
        call_step=take("<u4", calls),
        call_layer=take("<u2", calls),
        call_rows=take("<u4", calls),
        experts=take(header.expert_dtype, routes),
        weights=take("<f2", routes) if header.weights else None,
        hidden_call=take("<u4", hidden),
        hidden_row=take("<u4", hidden),
        hidden=take("<f2", hidden * header.hidden_size).reshape(hidden, header.hidden_size),
    )
    experts_of = np.array([layer.experts for layer in header.layers])
    consistent = (
        place == len(raw)
        and (block.phase <= PREFILL).all()
        and block.step_tokens.sum(dtype=np.int64) == tokens
        and (block.call_step < steps).all()
        and (np.diff(block.call_step.astype(np.int64)) >= 0).all()
        and (block.call_layer < len(header.layers)).all()
        and (block.call_rows <= block.step_tokens[block.call_step]).all()
        and block.call_starts[-1] == routes
        and (block.hidden_call < calls).all()
        and (block.hidden_row < block.call_rows[block.hidden_call]).all()
    )
    if consistent:
        sizes = np.diff(block.call_starts)
        consistent = bool((block.experts < np.repeat(experts_of[block.call_layer], sizes)).all())
    if not consistent:
        raise TraceFormatError(f"A block of {path} contradicts itself.", REMEDY)
    return block


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """Read a JSON object of a trace."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TraceFormatError(f"{path} holds something that is not JSON.", REMEDY) from error
    if not isinstance(value, dict):
        raise TraceFormatError(f"{path} holds JSON that is not an object.", REMEDY)
    return value


def parse_header(path: Path, data: bytes) -> TraceHeader:
    """Read a header; nothing in it is believed."""
    value = parse_json(path, data)
    try:
        layers = tuple(TraceLayer(**{**item, "read_bytes": tuple(item["read_bytes"])}) for item in value["layers"])
        header = TraceHeader(**{**value, "layers": layers})
        numbers = [n for layer in layers for n in (layer.layer, layer.experts, layer.top_k, layer.slot_bytes)]
        numbers += [n for layer in layers for n in (layer.stages, *layer.read_bytes)] + [header.hidden_size]
        fine = (
            bool(layers)
            and all(type(number) is int and 0 <= number < 1 << 50 for number in numbers)
            and all(0 < layer.top_k <= layer.experts <= 1 << 15 for layer in layers)
            and all(layer.slot_bytes > 0 and layer.stages > 0 for layer in layers)
            and all(len(layer.read_bytes) in (1, layer.experts) for layer in layers)
            and [layer.layer for layer in layers] == sorted({layer.layer for layer in layers})
            and all(
                isinstance(text, str)
                for text in (header.fingerprint, header.architecture, header.model, header.routers)
            )
        )
    except (KeyError, TypeError) as error:
        raise TraceFormatError(f"The header of {path} is not one of a trace: {error}.", REMEDY) from error
    if not fine:
        raise TraceFormatError(f"The header of {path} describes no possible model.", REMEDY)
    return header
