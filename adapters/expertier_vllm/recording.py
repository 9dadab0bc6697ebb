"""What forward passes tell a recorder of routes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.manager import Phase
from expertier.routing import Span, TraceRecorder


class StepRecording:
    """Turns forward passes into calls of a :class:`TraceRecorder`.

    Parameters
    ----------
    recorder : TraceRecorder
        Where to.
    hidden_every : int or None
        Every how many decode steps the routers' inputs are recorded, too.

    Notes
    -----
    A request of the trace is a sequence that goes on where it stopped; one that is computed again, after it was
    preempted, is another. Gate weights are those the experts' outputs are multiplied by, renormalised where the model
    does that.
    """

    def __init__(self, recorder: TraceRecorder, *, hidden_every: int | None = None) -> None:
        self.recorder = recorder
        self._next_request = recorder.next_request
        self._running: dict[Hashable, tuple[int, int]] = {}  # key to its request and the position that continues it
        self._hidden_every = hidden_every if recorder.header.hidden_size else None
        self._decoded = 0
        self._hidden = False

    def begin(self, spans: Sequence[Span], tokens: int, phase: Phase) -> None:
        """A forward pass over so many tokens begins."""
        requests, positions, ids = [], [], []
        running = {}
        for span in spans:
            count = len(span.tokens) if span.tokens is not None else 0
            request, expected = self._running.get(span.key, (-1, -1))
            if request < 0 or expected != span.position:
                request, self._next_request = self._next_request, self._next_request + 1
            running[span.key] = request, span.position + count
            requests.append(np.full(count, request))
            positions.append(np.arange(span.position, span.position + count))
            ids.append(np.asarray(span.tokens if count else [], np.int64))
        self._running |= running
        if sum(map(len, positions)) == tokens and tokens:
            columns = [np.concatenate(column) for column in (requests, positions, ids)]
        else:  # embeddings have no ids, and nobody says how many rows they are
            columns = [np.full(tokens, max(self._next_request - 1, 0)), *(np.full(tokens, -1) for _ in range(2))]
        self._decoded += phase == "decode"
        self._hidden = self._hidden_every is not None and phase == "decode" and self._decoded % self._hidden_every == 0
        self.recorder.begin_step(
            phase,
            requests=columns[0],
            positions=columns[1],
            token_ids=columns[2] if self.recorder.header.tokens else None,
        )

    def layer(self, layer: int, routes: NDArray[np.int64], weights: torch.Tensor, x: torch.Tensor) -> None:
        """The router of a layer has chosen."""
        hidden: NDArray[Any] | None = x.to(torch.float16, copy=True).numpy() if self._hidden else None
        self.recorder.record(layer, routes, weights.to(torch.float32, copy=True).numpy(), hidden)

    def end(self, *, failed: bool = False) -> None:
        """The forward pass is over."""
        if failed:
            self.recorder.drop_step()
            self._running.clear()
        else:
            self.recorder.end_step()
