"""What a ``llama_batch`` says about the sequences its tokens belong to."""

from __future__ import annotations

from typing import Any

import numpy as np

from expertier.routing import Span


def spans_of(batch: Any) -> list[Span]:
    """What a ``llama_batch`` says about sequences: neighbouring rows of one sequence with neighbouring positions.

    A batch made by ``llama_batch_get_one`` has neither positions nor sequences (llama.cpp counts them itself): its
    tokens belong to nobody we know.
    """
    count = batch.n_tokens
    if not batch.pos or not batch.seq_id:
        return [Span(key=None, position=0, tokens=None)] * count
    if count == 1:
        tokens = [batch.token[0]] if batch.token else None
        return [Span(key=batch.seq_id[0][0], position=batch.pos[0], tokens=tokens)]
    rows = batch.seq_id
    sequences = np.array([rows[index][0] for index in range(count)])
    positions = np.array(batch.pos[:count])
    ids = batch.token[:count] if batch.token else None
    starts = np.flatnonzero((np.diff(sequences) != 0) | (np.diff(positions) != 1)) + 1
    return [
        Span(
            key=int(sequences[start]),
            position=int(positions[start]),
            tokens=None if ids is None else ids[start:stop],
        )
        for start, stop in zip([0, *starts.tolist()], [*starts.tolist(), count], strict=True)
    ]
