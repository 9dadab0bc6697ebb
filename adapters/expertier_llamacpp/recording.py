"""What llama.cpp's graph tells a recorder of routes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expertier.routing import TraceRecorder
from expertier_llamacpp.batches import BatchTokens
from expertier_llamacpp.gate_input import GateInput
from expertier_llamacpp.router import RouterScores


class RouteRecording:
    """Turns batches and nodes into calls of a :class:`TraceRecorder`.

    Parameters
    ----------
    recorder : TraceRecorder
        Where to.
    hidden_every : int or None
        Every how many decoded tokens the routers' inputs are recorded, too.

    Notes
    -----
    The steps of one call are numbered by the positions of its tokens: a sequence that goes on where the last call ended
    is the same request. llama.cpp may reorder a batch of several sequences; such steps have neither positions nor token
    ids.
    """

    def __init__(self, recorder: TraceRecorder, *, hidden_every: int | None = None) -> None:
        self.recorder = recorder
        self._request = recorder.next_request - 1
        self._expected: tuple[int, int] | None = None  # sequence and position that continue the last request
        self._hidden_every = hidden_every if recorder.header.hidden_size else None
        self._decoded = 0
        self._gate_input = GateInput()
        self._router = RouterScores()
        self._tokens: Any = ()
        self._positions: Any = ()
        self._done = 0

    def begin(self, batch: BatchTokens) -> None:
        """A call over these rows starts."""
        self._done = 0
        unknown = np.full(batch.count, -1)
        positions = batch.positions
        if positions is None or len(set(batch.sequences)) > 1:
            self._request += 1
            self._expected = None
            self._positions = self._tokens = unknown
            return
        sequence = batch.sequences[0]
        self._positions = positions
        if self._expected != (sequence, positions[0]):
            self._request += 1
        self._expected = (sequence, int(positions[-1]) + 1)
        if self.recorder.header.tokens:
            self._tokens = unknown if batch.token_ids is None else batch.token_ids

    def begin_step(self, tokens: int, phase: Literal["decode", "prefill"]) -> None:
        """The next `tokens` tokens of the batch are computed."""
        start, self._done = self._done, self._done + tokens
        self._decoded += phase == "decode"
        positions, token_ids = self._positions[start : self._done], self._tokens[start : self._done]
        if len(positions) != tokens:  # whoever called llama.cpp went past us
            positions = token_ids = np.full(tokens, -1)
        self.recorder.begin_step(
            phase,
            requests=max(self._request, 0),
            positions=positions,
            token_ids=token_ids if self.recorder.header.tokens else None,
        )

    def layer(self, layer: int, routes: NDArray[np.int64], node: int) -> None:
        """The router of a layer has chosen; `node` holds the ids."""
        hidden = None
        if self._hidden_every is not None and len(routes) == 1 and self._decoded % self._hidden_every == 0:
            found = self._gate_input.of(node)
            hidden = None if found is None else found.astype(np.float16)  # a copy: the graph goes on
        self.recorder.record(layer, routes, self._router.probabilities(node, routes), hidden)

    def end_step(self, *, failed: bool = False) -> None:
        """The step is over."""
        if failed:
            self.recorder.drop_step()
            self._expected = None
        else:
            self.recorder.end_step()
