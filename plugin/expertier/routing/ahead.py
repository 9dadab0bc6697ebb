"""Loads ahead of the router: whole layers while a prompt streams, the likeliest experts while tokens are decoded.

With a trained predictor the whole path of a token is known, more or less, before its first layer runs, and loads for
all later layers are kept under way; every router that has chosen corrects what is left of the path. Without one, the
next layer's gate on this layer's input says what is likely there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.routing.following import Follower
from expertier.routing.gate import Confidence, GainGate
from expertier.routing.lookahead import Lookahead
from expertier.routing.path_loads import PathLoads, Prefetcher
from expertier.routing.predictor import Chances, Forecast, RoutePredictor
from expertier.routing.prefetch_plan import DOUBTFUL_CHANCE, LEAST_CHANCE
from expertier.routing.sequences import Span

_ASK_AGAIN = 16  # steps after which a predictor that nobody heeds, or that is too dear, is asked again
_DEAR = 0.05  # share of a step that forecasts may take where they only decide who stays
_PACE = 0.1  # weight of one step in what they take
_STREAM_FROM = 0.5  # share of a layer's experts in use from which the next layer is streamed whole

_SURE = 0.7  # share of a layer's expected uses, by experts likelier than not, from which the lookahead adds nothing
_INSISTED = 1  # layers ahead whose tokens' insistence is foreseen
_LISTENED = 2  # layers whose routers a predictor is told about: those further on know too little

GateInput = Callable[[], "NDArray[np.float32] | None"]
"""Gives the input of a layer's router, shape ``(tokens, hidden)``, or ``None`` where it cannot be had."""

Insisted = Callable[[int, "NDArray[np.float32]"], "NDArray[np.int64]"]
"""Of a later layer and what its router will probably say: the absent experts that no stand-in is allowed for."""


class Loader(Prefetcher, Protocol):
    """What executes the loads: the offload manager."""

    @property
    def bytes_read(self) -> int:
        """Bytes of all loads so far."""

    @property
    def under_way(self) -> int:
        """Loads ahead of need that have begun and that nobody has waited for."""

    def resident(self, layer: int) -> NDArray[np.bool_]:
        """Which experts of a layer are resident, shape ``(experts,)``."""


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
    predictor : RoutePredictor, optional
        Predicts whole paths; the lookahead then only corrects it, where the predictor listens to it.
    listener : callable, optional
        Told the forecast of every step: whoever decides what stays. It is told while the gate is closed, too, judges
        for itself what a forecast is worth, and answers whether it heeds it. While it does not, or forecasts take more
        than a twentieth of a step, and the gate is closed, the predictor is asked only now and then.
    ahead : int
        Most experts loading ahead of need during decode, for each token of a step and at most as many as `path_ahead`:
        for the next layer, by the lookahead.
    path_ahead : int
        Most experts loading ahead of need during decode, for all later layers together.
    least, least_doubtful : float
        Chance from which an expert is loaded ahead, and the same for whole paths where storage idles often.
    clock : callable
        Gives the seconds by which the gate measures.
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
        predictor: RoutePredictor | None = None,
        listener: Callable[[Forecast], bool] | None = None,
        ahead: int = 2,
        path_ahead: int = 4,
        least: float = LEAST_CHANCE,
        least_doubtful: float = DOUBTFUL_CHANCE,
        clock: Callable[[], float] = time.perf_counter,
        last_is_narrow: bool = False,
    ) -> None:
        self._clock = clock
        self._manager = manager
        self._experts = dict(experts)
        self._next = dict(itertools.pairwise(sorted(experts)))
        self._lookahead = lookahead
        self.gate = gate
        self._ahead, self._most = ahead, path_ahead
        self._follower = Follower(predictor) if predictor is not None else None
        self._listener = listener
        self._position = {layer: position for position, layer in enumerate(sorted(experts))}
        self.confidence = Confidence(len(experts), max(experts.values()))
        self._least = least
        self._path = PathLoads(
            manager,
            sorted(experts),
            confidence=self.confidence,
            ahead=path_ahead,
            least=least,
            least_doubtful=least_doubtful,
        )
        self._predicted = False  # whether the running step's path was predicted
        self._forecast: Chances | None = None  # before its first layer
        self._unsure = np.zeros(len(experts), bool)  # layers about which that knows little
        self._heeded = True  # whether the listener lets forecasts decide
        self._unheeded = 0  # steps since it was told one
        self._spent = 0.0  # seconds of the running step that its forecast took
        self._cost = 0.0  # share of a step that forecasts take
        self._tokens = 0
        self._last_is_narrow = last_is_narrow
        self._last_step: tuple[float, int] | None = None  # clock and bytes when the last decode step passed its end

    @property
    def follows_tokens(self) -> bool:
        """Whether :meth:`begin` wants to know the tokens of steps."""
        return self._follower is not None and not self._follower.failure

    def words(self) -> str:
        """What predicts, for the mode line."""
        names = [] if self._follower is None else [self._follower.predictor.name]
        if self._lookahead is not None:
            names.append("lookahead")
        return " + ".join(names) or "nothing"

    def learned(self) -> dict[str, Any]:
        """What a later run may begin with (:meth:`warm`); plain data."""
        found: dict[str, Any] = {}
        if self._lookahead is not None:
            found["lookahead"] = self._lookahead.learned()
        if self._follower is not None:
            found["predictor"] = {"name": self._follower.predictor.name, **self.confidence.learned()}
        if (winner := self.gate.learned()) is not None:
            found["gate"] = {"by": self.words(), "prefetch": winner}
        return found

    def warm(self, learned: Mapping[str, Any]) -> None:
        """Begin with what an earlier run found; what is about another predictor, or makes no sense, is passed over."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if self._lookahead is not None:
                self._lookahead.warm(learned["lookahead"])
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if self._follower is not None and learned["predictor"]["name"] == self._follower.predictor.name:
                self.confidence.warm(learned["predictor"])
        with contextlib.suppress(KeyError, TypeError):
            if learned["gate"]["by"] == self.words():
                self.gate.warm(learned["gate"]["prefetch"] is True)

    def begin(self, spans: Sequence[Span], *, decode: bool) -> None:
        """A step's tokens are known; to be called before its first layer, where :attr:`follows_tokens`.

        Parameters
        ----------
        spans : sequence of Span
            Its tokens; of a decode step one span for each of its rows, in order.
        decode : bool
            Whether every token is of a different sequence, and an expert may be absent.
        """
        self._predicted = False
        if self._follower is None:
            return
        self._unheeded += 1
        welcome = (self._heeded and self._cost <= _DEAR) or self._unheeded >= _ASK_AGAIN
        wanted = self.gate.open or (self._listener is not None and welcome)
        started = self._clock()
        forecast = self._follower.begin(spans, decode=decode and wanted)
        if forecast is None:
            return
        self._spent = (self._clock() - started) / self._unheeded  # it caught up with the steps between
        self._predicted = True
        self._forecast = forecast.now
        self._unsure = _unsure(forecast.now, self.confidence.factor())
        if self._listener is not None:
            self._heeded = self._listener(forecast)
        self._unheeded = 0
        if self.gate.open:
            self._path.top_up(lambda: forecast.now, 0)

    def after_router(
        self,
        layer: int,
        routes: NDArray[np.int64],
        gate_input: GateInput,
        *,
        decode: bool,
        insisted: Insisted | None = None,
    ) -> None:
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
        insisted : callable, optional
            Where stand-ins are allowed: what is loaded ahead then is what they cannot stand in for.
        """
        if decode and insisted is not None:
            self._load_insisted(layer, len(routes), gate_input, insisted)
        elif decode:
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
        if self._lookahead is None and self._follower is None:
            return
        following = self._next.get(layer)
        if self._lookahead is not None:
            self._lookahead.learn(layer, routes)
        if self._predicted and self._follower is not None:
            started = self._clock()
            self._follower.observe(layer, routes)
            self._spent += self._clock() - started
            self.confidence.settle(self._position[layer], routes)
        if following is None:
            self._end_step()
            return
        if not self.gate.open:
            return
        gate_input = functools.cache(gate_input)
        if self._predicted and self._follower is not None:
            self._path.top_up(lambda: self._refined(layer, gate_input), self._position[layer] + 1)
        if self._lookahead is not None:
            self._look_ahead(layer, following, routes, gate_input)

    def _end_step(self) -> None:
        now, volume = self._clock(), self._manager.bytes_read
        if self._last_step is not None:
            seconds = now - self._last_step[0]
            self.gate.step(seconds, volume - self._last_step[1])
            if self._predicted and seconds > 0:
                self._cost += _PACE * (self._spent / seconds - self._cost)
        self._last_step = now, volume
        self._predicted = False

    def _load_insisted(self, layer: int, tokens: int, gate_input: GateInput, insisted: Insisted) -> None:
        if self._lookahead is None:
            return
        if layer not in self._next:
            self._end_step()
            return
        if not self.gate.open or (hidden := gate_input()) is None:
            return
        for later, scores in self._lookahead.scores(layer, hidden, ahead=_INSISTED).items():
            wanted = insisted(later, scores)
            if wanted.size:
                # As if it were certain: four in five come true, and each would be loaded in a layer's time anyway.
                self._manager.prefetch(later, wanted, limit=min(self._ahead * tokens, self._most))

    def _refined(self, layer: int, gate_input: GateInput) -> Chances | None:
        """The rest of the path, with what the next routers say about this layer's input where the predictor listens.

        Of a next layer that the forecast is sure of, it says what the forecast said: nearly the same, for nothing.
        """
        assert self._follower is not None
        if not self._unsure[self._position[layer] + 1]:
            return self._forecast
        if self._lookahead is None or not self._follower.listens or (hidden := gate_input()) is None:
            return self._follower.refine()
        tables = self._lookahead.scores(layer, hidden, ahead=_LISTENED)
        rows = [{later: table[row] for later, table in tables.items()} for row in range(len(hidden))]
        return self._follower.refine(rows)

    def _look_ahead(self, layer: int, following: int, routes: NDArray[np.int64], gate_input: GateInput) -> None:
        assert self._lookahead is not None
        limit = min(self._ahead * len(routes), self._most)
        if self._predicted and (not self._unsure[self._position[following]] or self._manager.under_way >= limit):
            return
        resident = self._manager.resident(following)
        if resident.all():
            return
        hidden = gate_input()
        if hidden is None:
            return
        candidates, chances = self._lookahead.predict(layer, hidden, resident)
        likely = chances >= self._least
        if likely.any():
            self._manager.prefetch(following, candidates[likely], chances[likely], limit=limit)


def _unsure(chances: Chances, belief: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Layers about which a forecast knows so little that the next layer's own gate knows more, shape ``(layers,)``.

    Looking ahead in every layer would cost more than the forecast.
    """
    known = np.where(chances >= LEAST_CHANCE, chances * belief, 0.0)
    result: NDArray[np.bool_] = ~(known.sum(1) > _SURE * chances.sum(1))  # nor about one that is no number
    return result
