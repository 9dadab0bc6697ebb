"""Loads ahead of the router: whole layers while a prompt streams, the likeliest experts while tokens are decoded."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.routing.gate import GainGate
from expertier.routing.lookahead import Lookahead

_LEAST_CHANCE = 0.5  # below it a prefetch more often steals a slot and device time than it saves a wait
_STREAM_FROM = 0.5  # share of a layer's experts in use from which the next layer is streamed whole

GateInput = Callable[[], "NDArray[np.float32] | None"]
"""Gives the input of a layer's router, shape ``(tokens, hidden)``, or ``None`` where it cannot be had."""


class Loader(Protocol):
    """What executes the loads: the offload manager."""

    def resident(self, layer: int) -> NDArray[np.bool_]:
        """Which experts of a layer are resident, shape ``(experts,)``."""

    def prefetch(
        self,
        layer: int,
        experts: NDArray[np.int64],
        probabilities: NDArray[np.float64] | None = None,
        *,
        limit: int,
    ) -> int:
        """Load likely experts, likeliest first, with at most `limit` loads under way; return how many began."""


class AheadLoader:
    """Starts loads for the next layer when a layer's router has chosen.

    Parameters
    ----------
    manager : Loader
        The offload manager.
    experts : mapping of int to int
        Layer to number of experts.
    lookahead : Lookahead or None
        Predictor for decode steps; ``None`` leaves only streaming.
    gate : GainGate
        Decides whether the predictor is listened to.
    ahead : int
        Most experts loading ahead of need during decode of one token.
    last_is_narrow : bool
        Whether the engine runs a prompt's last layer for the rows with output only, until steps show otherwise.
    """

    def __init__(
        self,
        *,
        manager: Loader,
        experts: Mapping[int, int],
        lookahead: Lookahead | None,
        gate: GainGate,
        ahead: int = 2,
        last_is_narrow: bool = False,
    ) -> None:
        self._manager = manager
        self._experts = dict(experts)
        self._next = dict(itertools.pairwise(sorted(experts)))
        self._lookahead = lookahead
        self.gate = gate
        self._ahead = ahead
        self._tokens = 0
        self._last_is_narrow = last_is_narrow
        self._last_step: float | None = None  # when the previous decode step passed its last layer

    def after_router(self, layer: int, routes: NDArray[np.int64], gate_input: GateInput, *, decode: bool) -> None:
        """Act on what the router of a layer chose.

        Parameters
        ----------
        layer : int
            The layer.
        routes : ndarray of int64, shape (tokens, top_k)
            Its routes.
        gate_input : callable
            Gives its router's input, called only when needed.
        decode : bool
            Whether every token is of a different sequence.
        """
        if decode:
            self._predict(layer, routes, gate_input)
        else:
            self._stream(layer, routes)

    def _stream(self, layer: int, routes: NDArray[np.int64]) -> None:
        following = self._next.get(layer)
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

    def _predict(self, layer: int, routes: NDArray[np.int64], gate_input: GateInput) -> None:
        if self._lookahead is None:
            return
        following = self._next.get(layer)
        self._lookahead.learn(layer, routes)
        if following is None:
            now = time.perf_counter()
            if self._last_step is not None:
                self.gate.step(now - self._last_step)
            self._last_step = now
            return
        if not self.gate.open:
            return
        resident = self._manager.resident(following)
        if resident.all():
            return
        hidden = gate_input()
        if hidden is None:
            return
        candidates, chances = self._lookahead.predict(layer, hidden, resident)
        likely = chances >= _LEAST_CHANCE
        if likely.any():
            limit = self._ahead * len(routes)
            self._manager.prefetch(following, candidates[likely], chances[likely], limit=limit)
