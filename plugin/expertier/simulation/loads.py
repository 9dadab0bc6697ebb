"""Loads ahead of the router in a replay: candidates of oracles, or what an adapter does, by the same code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.errors import UnsupportedOptionError
from expertier.manager import OffloadManager
from expertier.residency.base import IntArray
from expertier.routing.ahead import AheadLoader
from expertier.routing.gate import GainGate
from expertier.routing.lookahead import Lookahead
from expertier.routing.predictor import RoutePredictor
from expertier.routing.prefetch_plan import DOUBTFUL_CHANCE, LEAST_CHANCE
from expertier.routing.sequences import Span
from expertier.routing.trace_format import PREFILL
from expertier.simulation.events import Events

Candidates = tuple[int, IntArray, "NDArray[np.float64] | None"]
"""A later layer of this step, its likely experts, likeliest first, and the chance of each (``None``: certain)."""


class StepLoads(Protocol):
    """Begins loads as a replay goes on. It may look at everything up to the present event, and oracles beyond it."""

    def begin_step(self, step: int) -> None:
        """A step's tokens are known; called before :meth:`OffloadManager.begin_step`."""

    def after_router(self, event: int) -> None:
        """The router of an event has chosen, and its loads have begun."""


class Oracle(Protocol):
    """Names candidates."""

    def after_router(self, event: int) -> Iterable[Candidates]:
        """Return candidates when the router of an event has chosen."""


class OracleLoads:
    """Loads what an oracle names.

    Parameters
    ----------
    manager : OffloadManager
        What loads.
    oracle : Oracle
        What names them.
    ahead : int
        Most loads under way ahead of need.
    """

    def __init__(self, manager: OffloadManager, oracle: Oracle, *, ahead: int = 2) -> None:
        self._manager = manager
        self._oracle = oracle
        self._ahead = ahead

    def begin_step(self, step: int) -> None:
        pass

    def after_router(self, event: int) -> None:
        for layer, experts, chances in self._oracle.after_router(event):
            self._manager.prefetch(layer, experts, chances, limit=self._ahead)


class AdapterLoads:
    """Does what an adapter does: prompts stream, a predictor forecasts, routers correct it, a gate watches.

    Parameters
    ----------
    events : Events
        The trace, with token ids where there is a predictor.
    manager : OffloadManager
        What loads and is told forecasts.
    predictor : RoutePredictor, optional
        Of whole paths.
    lookahead : Lookahead, optional
        Of later layers from recorded router inputs.
    gate : GainGate, optional
        By default one that measures.
    clock : callable, optional
        Gives the seconds by which the gate and what forecasts cost are measured; by default none pass.
    load : bool
        Whether anything is loaded ahead; otherwise forecasts only decide who stays.
    least, least_doubtful : float
        As for :class:`expertier.routing.ahead.AheadLoader`.

    Raises
    ------
    UnsupportedOptionError
        The trace lacks what a predictor needs.
    """

    def __init__(
        self,
        events: Events,
        manager: OffloadManager,
        *,
        predictor: RoutePredictor | None = None,
        lookahead: Lookahead | None = None,
        gate: GainGate | None = None,
        clock: Callable[[], float] | None = None,
        load: bool = True,
        least: float = LEAST_CHANCE,
        least_doubtful: float = DOUBTFUL_CHANCE,
    ) -> None:
        if predictor is not None and events.token_ids is None:
            raise UnsupportedOptionError(
                "This trace has no token ids, and a predictor of paths reads tokens.",
                "Record one with `expertier profile ... --token-ids`.",
            )
        if lookahead is not None and not len(events.hidden):
            raise UnsupportedOptionError(
                "This trace has no inputs of routers, and the lookahead needs them.",
                "Record one with the option trace_hidden=1.",
            )
        self._events = events
        self._load = load
        layers = events.header.layers
        self._layers = [layer.layer for layer in layers]
        self.loader = AheadLoader(
            manager=manager,
            experts={layer.layer: layer.experts for layer in layers},
            lookahead=lookahead,
            gate=gate or GainGate("auto" if load else "on"),
            predictor=predictor,
            listener=manager.forecast,
            path_ahead=4 if load else 0,
            least=least,
            least_doubtful=least_doubtful,
            clock=clock or (lambda: 0.0),
            last_is_narrow=True,
        )

    def begin_step(self, step: int) -> None:
        if not self.loader.follows_tokens:
            return
        events = self._events
        assert events.token_ids is not None
        start, stop = events.token_starts[step : step + 2].tolist()
        requests, positions = events.requests[start:stop], events.positions[start:stop]
        ids = events.token_ids[start:stop]
        decode = bool(events.phase[step] != PREFILL)
        cuts = range(1, len(ids)) if decode else (np.flatnonzero(np.diff(requests)) + 1).tolist()
        edges = [0, *cuts, len(ids)]
        spans = [
            Span(
                key=int(requests[first]),
                position=int(positions[first]),
                tokens=ids[first:last].tolist() if positions[first] >= 0 else None,
            )
            for first, last in itertools.pairwise(edges)
        ]
        self.loader.begin(spans, decode=decode)

    def after_router(self, event: int) -> None:
        events = self._events
        decode = bool(events.decode[event])
        if not decode and not self._load:
            return

        def router_input() -> NDArray[np.float32] | None:
            sample = events.router_input(event)
            return None if sample is None else sample.astype(np.float32)[None]

        layer = self._layers[events.layer[event]]
        self.loader.after_router(layer, events.routes(event), router_input, decode=decode)
