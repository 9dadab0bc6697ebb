"""Loads ahead of the router: whole layers while a prompt streams, the likeliest experts while tokens are decoded."""

from __future__ import annotations

import ctypes
import itertools
import time

import numpy as np
from numpy.typing import NDArray

from expertier.manager import OffloadManager
from expertier.routing import GainGate, Lookahead
from expertier_llamacpp import ggml

_LEAST_CHANCE = 0.5  # below it a prefetch more often steals a slot and device time than it saves a wait
_STREAM_FROM = 0.5  # share of a layer's experts in use from which the next layer is streamed whole


class Prefetcher:
    """Starts loads for the next layer when a layer's router has chosen.

    Parameters
    ----------
    manager : OffloadManager
        Executes the loads.
    experts : dict of int to int
        Layer to number of experts.
    lookahead : Lookahead or None
        Predictor for decode steps; ``None`` leaves only streaming.
    gate : GainGate
        Decides whether the predictor is listened to.
    ahead : int
        Most experts loading ahead of need during decode.
    """

    def __init__(
        self,
        *,
        manager: OffloadManager,
        experts: dict[int, int],
        lookahead: Lookahead | None,
        gate: GainGate,
        ahead: int = 2,
    ) -> None:
        self._manager = manager
        self._experts = experts
        layers = sorted(experts)
        self._next = dict(itertools.pairwise(layers))
        self._lookahead = lookahead
        self.gate = gate
        self._ahead = ahead
        self._tokens = 0
        # llama.cpp drops the rows without output before the last layer's experts: of a prompt one row is left.
        self._last_is_narrow = True
        self._last_step: float | None = None  # when the previous decode step passed its last layer
        self._mul_mat = ggml.op_number("MUL_MAT")

    def after_router(self, layer: int, routes: NDArray[np.int64], node: int) -> None:
        """Act on the routes of `layer`, shape ``(tokens, top_k)``, found at the graph node `node`."""
        following = self._next.get(layer)
        if len(routes) > 1:
            self._last_step = None
            if following is None:
                self._last_is_narrow = 2 * len(routes) <= self._tokens
                return
            self._tokens = len(routes)
            if following not in self._next and self._last_is_narrow:
                return
            if len(np.unique(routes)) >= _STREAM_FROM * self._experts[layer]:
                count = self._experts[following]
                self._manager.prefetch(following, np.arange(count), limit=count)
            return
        if self._lookahead is None:
            return
        self._lookahead.learn(layer, routes[0])
        if following is None:
            now = time.perf_counter()
            if self._last_step is not None:
                self.gate.step(now - self._last_step)
            self._last_step = now
            return
        if not self.gate.open:
            return
        hidden = self._gate_input(node)
        if hidden is None:
            return
        resident = self._manager.resident(following)
        if resident.all():
            return
        candidates, chances = self._lookahead.predict(layer, hidden, resident)
        likely = chances >= _LEAST_CHANCE
        if likely.any():
            self._manager.prefetch(following, candidates[likely], chances[likely], limit=self._ahead)

    def _gate_input(self, node: int) -> NDArray[np.float32] | None:
        """Follow the graph from the chosen ids back to the router's multiplication and return its input."""
        for _ in range(32):
            tensor = ggml.Tensor.from_address(node)
            if tensor.op == self._mul_mat:
                source = ggml.Tensor.from_address(tensor.src[1])
                if source.type != 0:  # GGML_TYPE_F32
                    return None
                return np.frombuffer((ctypes.c_float * source.ne[0]).from_address(source.data), np.float32)
            parent = tensor.view_src or tensor.src[0]
            if not parent:
                return None
            node = parent
        return None
