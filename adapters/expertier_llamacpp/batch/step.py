"""A ``llama_batch`` over numpy memory: filling one costs no Python call per token."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray


class StepBatch:
    """The tokens of one step, of any sequences.

    Parameters
    ----------
    capacity : int
        Most tokens in a step.

    Attributes
    ----------
    batch : llama_batch
        What ``llama_decode`` takes. ``llama_cpp``'s own wrapper of it has no room for several sequences at
        chosen positions.
    """

    def __init__(self, capacity: int) -> None:
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._counts = np.ones(capacity, np.int32)  # every token belongs to one sequence
        self._sequences = np.zeros(capacity, np.int32)
        self._rows = self._sequences.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        self._wanted = np.zeros(capacity, np.int8)
        self.batch: Any = llama_cpp.llama_batch(
            n_tokens=0,
            token=_pointer(self._tokens, llama_cpp.llama_token),
            embd=None,
            pos=_pointer(self._positions, llama_cpp.llama_pos),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._rows, ctypes.POINTER(llama_cpp.llama_seq_id)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def n_tokens(self) -> int:
        """Tokens in the step (the name ``llama_cpp``'s wrapper has for it)."""
        return int(self.batch.n_tokens)

    def tokens(self) -> NDArray[np.int64]:
        """The ids of the tokens, row by row."""
        return self._tokens[: self.n_tokens()].astype(np.int64)

    def wanted_rows(self) -> NDArray[np.int64]:
        """Rows whose logits are wanted."""
        return np.flatnonzero(self._wanted[: self.n_tokens()])

    def fill(self, parts: Iterable[tuple[int, int, Sequence[int], bool]]) -> list[int]:
        """Put the tokens of a step in.

        Parameters
        ----------
        parts : iterable of (sequence, position, tokens, wanted)
            Neighbouring tokens of a sequence, and whether the logits of the last one are wanted.

        Returns
        -------
        list of int
            For every part the row of its last token.
        """
        rows = []
        end = 0
        for sequence, position, tokens, wanted in parts:
            start, end = end, end + len(tokens)
            self._tokens[start:end] = tokens
            self._positions[start:end] = np.arange(position, position + end - start)
            self._sequences[start:end] = sequence
            self._wanted[start:end] = 0
            self._wanted[end - 1] = wanted
            rows.append(end - 1)
        self.batch.n_tokens = end
        return rows


def _pointer(values: Any, kind: Any) -> Any:
    return ctypes.cast(values.ctypes.data, ctypes.POINTER(kind))
