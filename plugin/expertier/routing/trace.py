"""Reading recorded routes; the file format is described in :mod:`expertier.routing.trace_format`."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from expertier.errors import (
    TraceChecksumError,
    TraceFormatError,
    TraceMismatchError,
    TraceTooShortError,
    TraceTruncatedError,
    TraceVersionError,
)
from expertier.routing.trace_format import (
    COUNTS,
    DECODE,
    DONE,
    FRAME,
    MAGIC,
    MOST_HEADER,
    MOST_RAW,
    NOTE,
    REMEDY,
    STEP,
    VERSION,
    TraceBlock,
    TraceCounts,
    TraceHeader,
    TraceLayer,
    decode_block,
    parse_header,
    parse_json,
)

__all__ = ["TokenTable", "Trace", "TraceBlock", "TraceHeader", "TraceLayer", "TraceStep", "read_trace"]


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """One forward pass.

    Attributes
    ----------
    phase : {"decode", "prefill"}
        Tokens of one sequence each, or several of one sequence.
    requests : ndarray of uint32, shape (tokens,)
        Number of each token's request.
    positions : ndarray of int32, shape (tokens,)
        Its place in the sequence, -1 if unknown.
    token_ids : ndarray of int32, shape (tokens,), or None
        The tokens that were fed.
    routes : dict of int to ndarray, shape (rows, top_k)
        Layer index to experts, in the order in which layers ran; fewer rows than tokens are the last ones.
    weights : dict of int to ndarray of float16, shape (rows, top_k)
        The gate's weights of these, empty if not recorded.
    """

    phase: Literal["decode", "prefill"]
    requests: NDArray[np.uint32]
    positions: NDArray[np.int32]
    token_ids: NDArray[np.int32] | None
    routes: dict[int, NDArray[Any]]
    weights: dict[int, NDArray[np.float16]]

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return len(self.requests)


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """A whole trace, a row per token: what predictors learn from.

    Attributes
    ----------
    header : TraceHeader
        What the trace is of.
    request, position : ndarray, shape (tokens,)
        As in :class:`TraceStep`.
    decode : ndarray of bool, shape (tokens,)
        Whether the token was decoded rather than part of a prompt step.
    token_id : ndarray of int32, shape (tokens,), or None
        Fed tokens.
    routes : ndarray of int16, shape (tokens, layers, largest top_k)
        Experts; -1 where a layer did not run for a token or has fewer.
    weights : ndarray of float16, shape (tokens, layers, largest top_k), or None
        Gate weights, NaN where unknown.
    """

    header: TraceHeader
    request: NDArray[np.uint32]
    position: NDArray[np.int32]
    decode: NDArray[np.bool_]
    token_id: NDArray[np.int32] | None
    routes: NDArray[np.int16]
    weights: NDArray[np.float16] | None


class Trace:
    """A trace file that is read block by block.

    Parameters
    ----------
    path : Path
        The file.
    partial : bool
        Whether a file that was not closed is read as far as it is intact, instead of being refused.

    Attributes
    ----------
    header : TraceHeader
        What the trace is of.
    notes : dict
        Measurements the recorder left, such as ``compute_seconds_per_token``; complete after the blocks were read.
    complete : bool
        Whether the end was reached and the file had been closed; known after the blocks were read.
    intact_bytes : int
        Where the last intact block that is not the end mark stops; the same.

    Raises
    ------
    TraceFormatError, TraceVersionError, TraceChecksumError, TraceTruncatedError
        When opening, or while blocks are read.
    """

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.path = path
        self.partial = partial
        self.notes: dict[str, Any] = {}
        self.complete = False
        with self._open() as file:
            self.header = self._read_header(file)
            self._start = self.intact_bytes = file.tell()
        self.counts = TraceCounts()

    def blocks(self) -> Iterator[TraceBlock]:
        """Read all steps, a block at a time."""
        counts = TraceCounts()
        self.complete = False
        self.intact_bytes = self._start
        with self._open() as file:
            file.seek(self._start)
            while (item := self._read_block(file)) is not None:
                kind, payload, crc = item
                if kind == DONE:
                    self._check_end(file, parse_json(self.path, payload), counts)
                    self.complete = True
                    break
                if kind == NOTE:
                    self.notes.update(parse_json(self.path, payload))
                    counts.add(crc)
                elif kind == STEP:
                    block = decode_block(self.header, payload, self.path)
                    counts.add(crc, steps=len(block.phase), tokens=len(block.request))
                    counts.requests = max(counts.requests, int(block.request.max(initial=0)) + 1)
                    yield block
                else:
                    raise TraceFormatError(f"{self.path} has a block of the unknown kind {kind!r}.", REMEDY)
                self.intact_bytes = file.tell()
        self.counts = counts
        if not self.complete and not self.partial:
            raise TraceTruncatedError(
                f"{self.path} ends after {counts.tokens} tokens without an end mark: whatever recorded it was stopped.",
                "Use what there is with --partial, or record it again.",
            )

    def steps(self) -> Iterator[TraceStep]:
        """Read step by step."""
        for block in self.blocks():
            token_ends = np.cumsum(block.step_tokens, dtype=np.int64)
            call_ends = np.searchsorted(block.call_step, np.arange(len(block.phase)), side="right")
            for step, (stop, last) in enumerate(zip(token_ends.tolist(), call_ends.tolist(), strict=True)):
                start = stop - int(block.step_tokens[step])
                first = call_ends[step - 1] if step else 0
                routes, weights = {}, {}
                for call in range(first, last):
                    layer = self.header.layers[block.call_layer[call]]
                    routes[layer.layer] = block.routes(call)
                    if block.weights is not None:
                        begin, end = block.call_starts[call : call + 2]
                        weights[layer.layer] = block.weights[begin:end].reshape(-1, layer.top_k)
                yield TraceStep(
                    phase="prefill" if block.phase[step] else "decode",
                    requests=block.request[start:stop],
                    positions=block.position[start:stop],
                    token_ids=None if block.token_id is None else block.token_id[start:stop],
                    routes=routes,
                    weights=weights,
                )

    def tokens(self) -> TokenTable:
        """Read everything into one table."""
        tables = [_table_of(block) for block in self.blocks()]
        tables = tables or [_table_of(decode_block(self.header, COUNTS.pack(0, 0, 0, 0, 0), self.path))]

        def join(name: str) -> Any:
            parts = [getattr(table, name) for table in tables]
            return None if parts[0] is None else np.concatenate(parts)

        names = ("request", "position", "decode", "token_id", "routes", "weights")
        return TokenTable(header=self.header, **{name: join(name) for name in names})

    def require_model(self, fingerprint: str, name: str = "the model") -> None:
        """Refuse a trace of another model.

        Raises
        ------
        TraceMismatchError
            The fingerprints differ.
        """
        if fingerprint != self.header.fingerprint:
            raise TraceMismatchError(
                f"{self.path} is a trace of {self.header.model or self.header.architecture} "
                f"({self.header.fingerprint[:12]}), not of {name} ({fingerprint[:12]}).",
                "Record a trace of this model with `expertier profile`.",
            )

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise TraceFormatError(f"Cannot read {self.path}: {error.strerror}.", "Check the path.") from error

    def _read_header(self, file: BinaryIO) -> TraceHeader:
        start = file.read(16)
        if start[:8] != MAGIC[: len(start[:8])] or not start:
            raise TraceFormatError(
                f"{self.path} is not a trace of routes.", "Name a file that `expertier profile` wrote."
            )
        if len(start) < 16:
            raise self._cut()
        version, size = struct.unpack("<II", start[8:])
        if version > VERSION:
            raise TraceVersionError(
                f"{self.path} has version {version} of the trace format, this Expertier reads up to {VERSION}.",
                "Use a newer Expertier.",
            )
        if size > MOST_HEADER:
            raise TraceFormatError(f"{self.path} has a header of {size} bytes.", REMEDY)
        body, crc = file.read(size), file.read(4)
        if len(body) < size or len(crc) < 4:
            raise self._cut()
        if zlib.crc32(start + body) != struct.unpack("<I", crc)[0]:
            raise TraceChecksumError(f"The header of {self.path} is damaged.", REMEDY)
        return parse_header(self.path, body)

    def _cut(self) -> TraceTruncatedError:
        return TraceTruncatedError(f"{self.path} ends within its header.", REMEDY)

    def _read_block(self, file: BinaryIO) -> tuple[bytes, bytes, int] | None:
        """Return kind, raw payload and checksum of the next block; ``None`` where the file ends."""
        frame = file.read(FRAME.size)
        if len(frame) < FRAME.size:
            return None
        kind, crc, stored, raw, frame_crc = FRAME.unpack(frame)
        if zlib.crc32(frame[:-4]) != frame_crc:
            raise TraceChecksumError(f"{self.path} is damaged at byte {file.tell() - FRAME.size}.", REMEDY)
        if raw > MOST_RAW or stored > MOST_RAW:
            raise TraceFormatError(f"{self.path} has a block of {max(raw, stored)} bytes.", REMEDY)
        payload = file.read(stored)
        if len(payload) < stored:
            return None
        if zlib.crc32(payload) != crc:
            raise TraceChecksumError(f"{self.path} is damaged in the block before byte {file.tell()}.", REMEDY)
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(payload, raw + 1)
        except zlib.error as error:
            raise TraceFormatError(f"A block of {self.path} cannot be unpacked: {error}.", REMEDY) from error
        if len(data) != raw:
            raise TraceFormatError(f"A block of {self.path} is not as long as it says.", REMEDY)
        return kind, data, crc

    def _check_end(self, file: BinaryIO, end: Mapping[str, Any], counts: TraceCounts) -> None:
        if file.read(1):
            raise TraceFormatError(f"{self.path} goes on after its end.", REMEDY)
        if end != counts.end_mark():
            raise TraceChecksumError(f"Blocks of {self.path} are missing or in another order.", REMEDY)


def read_trace(
    path: str | Path, *, fingerprint: str | None = None, partial: bool = False, least_tokens: int = 0
) -> Trace:
    """Open a trace.

    Parameters
    ----------
    path : path
        The file.
    fingerprint : str, optional
        Of the model the trace must be of.
    partial : bool
        Whether a file that was not closed is read as far as it is intact.
    least_tokens : int
        Tokens there must be; above 0 the whole file is checked now.

    Raises
    ------
    TraceFormatError, TraceVersionError, TraceChecksumError, TraceTruncatedError
        It cannot be read.
    TraceMismatchError
        It is of another model.
    TraceTooShortError
        It has too few tokens.
    """
    trace = Trace(Path(path), partial=partial)
    if fingerprint is not None:
        trace.require_model(fingerprint)
    if least_tokens:
        for _ in trace.blocks():
            pass
        if trace.counts.tokens < least_tokens:
            held = {0: "no token", 1: "a single token"}.get(trace.counts.tokens, f"{trace.counts.tokens} tokens")
            raise TraceTooShortError(f"{path} holds {held}, {least_tokens} are needed.", "Record more text.")
    return trace


def _table_of(block: TraceBlock) -> TokenTable:
    header = block.header
    width = max(layer.top_k for layer in header.layers)
    shape = (len(block.request), len(header.layers), width)
    routes = np.full(shape, -1, np.int16)
    weights = None if block.weights is None else np.full(shape, np.nan, np.float16)
    ends = np.cumsum(block.step_tokens, dtype=np.int64)
    for place, layer in enumerate(header.layers):
        calls = np.flatnonzero(block.call_layer == place)
        if not calls.size:
            continue
        rows = block.call_rows[calls].astype(np.int64)
        within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        token = np.repeat(ends[block.call_step[calls]] - rows, rows) + within
        flat = (np.repeat(block.call_starts[calls], rows) + within * layer.top_k)[:, None] + np.arange(layer.top_k)
        routes[token, place, : layer.top_k] = block.experts[flat]
        if weights is not None and block.weights is not None:
            weights[token, place, : layer.top_k] = block.weights[flat]
    return TokenTable(
        header=header,
        request=block.request,
        position=block.position,
        decode=np.repeat(block.phase == DECODE, block.step_tokens),
        token_id=block.token_id,
        routes=routes,
        weights=weights,
    )
