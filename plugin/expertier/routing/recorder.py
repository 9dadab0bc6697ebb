"""Recording routes while an engine runs, at next to no cost for it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expertier.errors import TraceError, TraceFormatError, TraceMismatchError
from expertier.routing.trace import Trace
from expertier.routing.trace_format import (
    DECODE,
    DONE,
    NOTE,
    PREFILL,
    STEP,
    TraceBlock,
    TraceCounts,
    TraceHeader,
    frame,
)

_ROWS_PER_BLOCK = 1 << 16  # a block of so many rows of routes is written at once even before its time


@dataclass
class _Call:
    """A layer's turn, as it was handed over."""

    layer: int
    routes: NDArray[Any]
    weights: NDArray[Any] | None
    hidden: NDArray[Any] | None
    hidden_rows: NDArray[Any] | None


@dataclass
class _Step:
    phase: int
    requests: NDArray[Any]
    positions: NDArray[Any]
    token_ids: NDArray[Any] | None
    calls: list[_Call] = field(default_factory=list)


class TraceRecorder:
    """Writes routes to a file.

    A layer call costs the engine's thread one append to a list. Columns are made, compressed and written by a thread of
    the recorder, about once a second.

    Parameters
    ----------
    path : path
        Where to. A trace of the same model with the same contents is continued; after a kill from its last intact
        block on.
    header : TraceHeader
        What is recorded.
    flush_seconds : float
        How much of a recording a kill may cost.

    Attributes
    ----------
    header : TraceHeader
        The same.
    next_request : int
        First request number that the file does not hold yet.

    Raises
    ------
    TraceFormatError
        The file cannot be written, or is something else than a trace.
    TraceMismatchError
        It is a trace of another model or with other contents.
    """

    def __init__(self, path: str | Path, header: TraceHeader, *, flush_seconds: float = 1.0) -> None:
        self.path = Path(path)
        self.header = header
        self._flush_seconds = flush_seconds
        self._counts = TraceCounts()
        self._file = self._open()
        self.next_request = self._counts.requests
        self._current: _Step | None = None
        self._pending: list[_Step] = []
        self._rows = 0
        self._error: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()  # guards what is pending
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expertier-trace", daemon=True)
        self._thread.start()

    def _open(self) -> BinaryIO:
        try:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            try:
                self._begin(file)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise TraceFormatError(
                f"The trace {self.path} cannot be written: {error.strerror}.", "Choose another file."
            ) from error
        return file

    def _begin(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TraceFormatError(
                f"The trace {self.path} is being recorded right now.", "Choose another file, or wait."
            ) from error
        if not os.fstat(file.fileno()).st_size:
            file.write(self.header.encode())
            file.flush()
            return
        old = Trace(self.path, partial=True)
        if old.header != self.header:
            same = old.header.fingerprint == self.header.fingerprint
            raise TraceMismatchError(
                f"{self.path} exists and is a trace {'with other contents' if same else 'of another model'}.",
                "Choose another file, or delete it.",
            )
        for _ in old.blocks():
            pass
        self._counts = old.counts
        file.truncate(old.intact_bytes)
        file.seek(old.intact_bytes)

    # ---- called by the engine's thread

    def begin_step(
        self,
        phase: Literal["decode", "prefill"],
        *,
        requests: ArrayLike,
        positions: ArrayLike,
        token_ids: ArrayLike | None = None,
    ) -> None:
        """Start a forward pass. What was recorded of one that did not end is dropped.

        Parameters
        ----------
        phase : {"decode", "prefill"}
            As for :meth:`expertier.manager.OffloadManager.begin_step`.
        requests, positions : array_like of int, shape (tokens,)
            Of every token its request's number and its place in the sequence (-1: unknown). A single number of
            `requests` counts for all.
        token_ids : array_like of int, shape (tokens,), optional
            Needed, and used, only when the header says ``tokens``.

        Raises
        ------
        TraceError
            Writing failed earlier.
        """
        if self._error is not None:
            raise self._failure()
        place = np.atleast_1d(np.asarray(positions))
        ids = None
        if self.header.tokens:
            ids = np.asarray(token_ids)
            if ids.shape != place.shape:
                raise ValueError("the trace records token ids, and every token needs one")
        self._current = _Step(
            phase=DECODE if phase == "decode" else PREFILL,
            requests=np.broadcast_to(np.asarray(requests), place.shape),
            positions=place,
            token_ids=ids,
        )

    def record(
        self,
        layer: int,
        routes: NDArray[Any],
        weights: NDArray[Any] | None = None,
        hidden: NDArray[Any] | None = None,
        hidden_rows: NDArray[Any] | None = None,
    ) -> None:
        """Note what the router of a layer chose. The arrays are kept, not copied: do not write into them afterwards.

        Parameters
        ----------
        layer : int
            Index of the transformer layer.
        routes : ndarray of int, shape (rows, top_k)
            Experts; fewer rows than the step has tokens are those of the last ones.
        weights : ndarray of float, shape (rows, top_k), optional
            Gate weights.
        hidden : ndarray of float, shape (n, hidden_size), optional
            Router inputs of some rows.
        hidden_rows : ndarray of int, shape (n,), optional
            Which rows these are; by default the first.
        """
        if self._current is not None:
            self._current.calls.append(_Call(layer, routes, weights, hidden, hidden_rows))

    def end_step(self) -> None:
        """The step is complete."""
        step, self._current = self._current, None
        if step is None or not step.calls:
            return
        with self._lock:
            self._pending.append(step)
            self._rows += len(step.requests) * len(step.calls)
            full = self._rows >= _ROWS_PER_BLOCK
        if full:
            self._wake.set()

    def drop_step(self) -> None:
        """The step failed: nothing of it is kept."""
        self._current = None

    def note(self, values: Mapping[str, Any]) -> None:
        """Write measurements, such as ``compute_seconds_per_token``; they end up in :attr:`Trace.notes`."""
        self.flush()
        with self._writing:
            self._write(NOTE, json.dumps(dict(values)).encode())

    def flush(self) -> None:
        """Write what is complete now.

        Raises
        ------
        TraceError
            It cannot be written.
        """
        self._flush()
        if self._error is not None:
            raise self._failure()

    def close(self) -> None:
        """Write the rest and the end mark. Closing twice does nothing.

        Raises
        ------
        TraceError
            It cannot be written.
        """
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._thread.join()
        try:
            self._flush()
            if self._error is None:
                self._write(DONE, json.dumps(self._counts.end_mark()).encode())
        finally:
            self._file.close()
        if self._error is not None:
            raise self._failure()

    def disown(self) -> None:
        """Forget everything, in a forked child: the file is the parent's."""
        self._closed = True
        self._current = None

    def __enter__(self) -> TraceRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the writing thread

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            self._flush()

    def _flush(self) -> None:
        with self._writing:
            with self._lock:
                steps, self._pending = self._pending, []
                self._rows = 0
            if steps and self._error is None:
                try:
                    block = self._columns(steps)
                    requests = int(block.request.max(initial=0)) + 1
                    self._write(STEP, block.encode(), steps=len(steps), tokens=len(block.request))
                    self._counts.requests = max(self._counts.requests, requests)
                except Exception as error:  # carried to the engine's thread
                    self._error = error

    def _failure(self) -> TraceError:
        error = self._error
        reason = getattr(error, "strerror", None) or error
        failure = TraceFormatError(
            f"Recording to {self.path} failed: {reason}.", "Make room or choose another file, or record no trace."
        )
        failure.__cause__ = error
        return failure

    def _write(self, kind: bytes, raw: bytes, *, steps: int = 0, tokens: int = 0) -> None:
        data, crc = frame(kind, raw)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._error = error
            return
        self._counts.add(crc, steps=steps, tokens=tokens)

    def _columns(self, steps: list[_Step]) -> TraceBlock:
        header = self.header
        calls = [call for step in steps for call in step.calls]
        rows = np.array([len(call.routes) for call in calls], np.uint32)
        hidden_call, hidden_row, hidden = [], [], []
        if header.hidden_size:
            for index, call in enumerate(calls):
                if call.hidden is not None:
                    which = np.arange(len(call.hidden)) if call.hidden_rows is None else call.hidden_rows
                    hidden_call.append(np.full(len(call.hidden), index, np.uint32))
                    hidden_row.append(np.asarray(which, np.uint32))
                    hidden.append(np.asarray(call.hidden, np.float16))
        return TraceBlock(
            header=header,
            phase=np.array([step.phase for step in steps], np.uint8),
            step_tokens=np.array([len(step.requests) for step in steps], np.uint32),
            request=np.concatenate([step.requests for step in steps]).astype(np.uint32),
            position=np.concatenate([step.positions for step in steps]).astype(np.int32),
            token_id=np.concatenate([step.token_ids for step in steps]).astype(np.int32) if header.tokens else None,
            call_step=np.repeat(np.arange(len(steps), dtype=np.uint32), [len(step.calls) for step in steps]),
            call_layer=np.array([header.position_of[call.layer] for call in calls], np.uint16),
            call_rows=rows,
            experts=np.concatenate([call.routes.ravel() for call in calls]).astype(header.expert_dtype),
            weights=np.concatenate(
                [
                    np.full(call.routes.size, np.nan, np.float16)
                    if call.weights is None
                    else call.weights.ravel().astype(np.float16)
                    for call in calls
                ]
            )
            if header.weights
            else None,
            hidden_call=np.concatenate(hidden_call) if hidden_call else np.empty(0, np.uint32),
            hidden_row=np.concatenate(hidden_row) if hidden_row else np.empty(0, np.uint32),
            hidden=np.concatenate(hidden) if hidden else np.empty((0, header.hidden_size), np.float16),
        )
