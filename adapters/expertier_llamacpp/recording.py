"""What llama.cpp's graph tells a recorder of routes."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expertier.routing import TraceRecorder
from expertier_llamacpp import ggml
from expertier_llamacpp.gate_input import GateInput

_DEPTH = 6  # nodes between the chosen ids and the probabilities they were chosen by, generously
_F32 = 0  # Upstream: GGML_TYPE_F32


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
        self._probabilities = GateWeights()
        self._tokens: Any = ()
        self._positions: Any = ()
        self._done = 0

    def begin(self, batch: Any) -> None:
        """A call over a ``llama_batch`` starts."""
        count = batch.n_tokens
        sequences = {batch.seq_id[index][0] for index in range(count)} if count > 1 else {batch.seq_id[0][0]}
        self._done = 0
        if len(sequences) > 1:
            self._request += 1
            self._expected = None
            self._positions = self._tokens = np.full(count, -1)
            return
        sequence = sequences.pop()
        self._positions = batch.pos[:count]
        if self._expected != (sequence, self._positions[0]):
            self._request += 1
        self._expected = (sequence, self._positions[-1] + 1)
        self._tokens = (batch.token[:count] if batch.token else [-1] * count) if self.recorder.header.tokens else ()

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
        self.recorder.record(layer, routes, self._probabilities.of(node, routes), hidden)

    def end_step(self, *, failed: bool = False) -> None:
        """The step is over."""
        if failed:
            self.recorder.drop_step()
            self._expected = None
        else:
            self.recorder.end_step()


class GateWeights:
    """Finds the probabilities by which a router has chosen."""

    def __init__(self) -> None:
        self._probability_ops = {ggml.op_number("SOFT_MAX"), ggml.op_number("UNARY")}
        self._mul_mat = ggml.op_number("MUL_MAT")

    def of(self, node: int, routes: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return the router's probabilities of the chosen experts, before any renormalisation.

        Parameters
        ----------
        node : int
            Address of the node with the ids, just computed.
        routes : ndarray of int64, shape (tokens, top_k)
            Its contents.

        Returns
        -------
        ndarray of float32, shape (tokens, top_k), or None
            ``None`` for models that choose by logits (gpt-oss) or by groups of experts (DeepSeek).
        """
        for _ in range(_DEPTH):
            tensor = ggml.Tensor.from_address(node)
            if tensor.op in self._probability_ops:
                experts, tokens = tensor.ne[0], tensor.ne[1]
                if tensor.type != _F32 or tokens != len(routes) or tensor.nb[1] != 4 * experts:
                    return None
                # The graph still needs them for the weights, so their memory was not given to another node yet.
                table = np.frombuffer((ctypes.c_float * (experts * tokens)).from_address(tensor.data), np.float32)
                places = routes if tokens == 1 else routes + np.arange(tokens)[:, None] * experts
                weights: NDArray[np.float32] = table[places]  # a copy: the graph goes on
                return weights
            parent = tensor.view_src or tensor.src[0]
            if tensor.op == self._mul_mat or not parent:
                return None
            node = parent
        return None
