"""What a ``llama_batch`` says about its tokens; nobody else reads one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.manager import Phase
from expertier.routing import Span


class BatchTokens:
    """The rows of a ``llama_batch``, read when they are asked for and only while the batch lives.

    Parameters
    ----------
    batch : llama_batch
        What ``llama_decode`` was called with.

    Notes
    -----
    llama.cpp computes a batch in micro-batches. With one KV buffer for all sequences (``kv_unified``, or one sequence)
    these are neighbouring rows, in order (upstream: ``llama_batch_allocr::split_simple``).
    """

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        self.count = int(batch.n_tokens)

    @functools.cached_property
    def sequences(self) -> list[int]:
        """The sequence of every row."""
        rows = self._batch.seq_id
        return [rows[index][0] for index in range(self.count)]

    @functools.cached_property
    def positions(self) -> NDArray[np.int32] | None:
        """The position of every row; ``None`` where llama.cpp counts them itself."""
        return np.array(self._batch.pos[: self.count], np.int32) if self._batch.pos else None

    @functools.cached_property
    def token_ids(self) -> list[int] | None:
        """The token of every row; ``None`` for a batch of embeddings."""
        return self._batch.token[: self.count] if self._batch.token else None

    @functools.cached_property
    def whole(self) -> Phase:
        """What kind of step the batch would be if it were computed at once."""
        return self.phase(0, self.count)

    def phase(self, start: int, stop: int) -> Phase:
        """What kind of step the rows from `start` to `stop` are.

        A step is "decode" when each of its tokens belongs to a sequence of its own: such tokens are simultaneous. As
        soon as it has several tokens of one sequence, it computes a prompt, whoever else decodes beside it.
        """
        if stop - start <= 1:
            return "decode"
        rows = self._batch.seq_id  # none in a batch of llama_batch_get_one: one sequence then
        if not rows or stop > self.count or rows[start][0] == rows[start + 1][0]:
            return "prefill"
        sequences = self.sequences[start:stop]
        return "decode" if len(set(sequences)) == len(sequences) else "prefill"

    def spans(self) -> list[Span]:
        """Neighbouring rows of one sequence with neighbouring positions.

        A batch made by ``llama_batch_get_one`` has neither positions nor sequences (llama.cpp counts them itself): its
        tokens belong to nobody we know.
        """
        count, positions, ids = self.count, self.positions, self.token_ids
        if positions is None or not self._batch.seq_id:
            return [Span(key=None, position=0, tokens=None)] * count
        if count == 1:
            return [Span(key=self.sequences[0], position=int(positions[0]), tokens=ids)]
        sequences = np.array(self.sequences)
        cuts = (np.flatnonzero((np.diff(sequences) != 0) | (np.diff(positions) != 1)) + 1).tolist()
        return [
            Span(
                key=int(sequences[start]),
                position=int(positions[start]),
                tokens=None if ids is None else ids[start:stop],
            )
            for start, stop in zip([0, *cuts], [*cuts, count], strict=True)
        ]
