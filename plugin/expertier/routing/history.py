"""What predictors remember of a sequence: its tokens and the routes that were observed, cut back where it goes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.routing.predictor import Chances, Forecast, IntArray, RoutedModel, Scores

_FIRST_ROOM = 256


class History:
    """Tokens and observed routes of one sequence.

    Parameters
    ----------
    model : RoutedModel
        Whose routes.
    origin : int
        Position of the first token in the engine's sequence.

    Attributes
    ----------
    length : int
        Tokens known.
    step : int
        Index of the first token of the present step.
    """

    def __init__(self, model: RoutedModel, origin: int = 0) -> None:
        self.origin = origin
        self.length = self.step = 0
        self._tokens = np.empty(_FIRST_ROOM, np.int64)
        self._routes = np.full((_FIRST_ROOM, len(model.layers), max(model.top_k)), -1, np.int16)

    @property
    def tokens(self) -> IntArray:
        """Ids, shape ``(length,)``."""
        return self._tokens[: self.length]

    @property
    def routes(self) -> NDArray[np.int16]:
        """Observed experts, -1 where not (yet) observed, shape ``(length, layers, largest top_k)``."""
        return self._routes[: self.length]

    def grow(self, tokens: IntArray, start: int | None) -> None:
        """Append the tokens of a step at position `start`; what was known from there on is dropped."""
        first = self.length if start is None else start - self.origin
        if not 0 <= first <= self.length:
            self.origin, first = start or 0, 0
        stop = first + len(tokens)
        room = len(self._tokens)
        if stop > room:
            more = max(stop, 2 * room) - room
            self._tokens = np.concatenate([self._tokens, np.empty(more, np.int64)])
            self._routes = np.concatenate([self._routes, np.full((more, *self._routes.shape[1:]), -1, np.int16)])
        self._tokens[first:stop] = tokens
        self._routes[first : max(stop, self.length)] = -1
        self.step, self.length = first, stop

    def note(self, place: int, routes: IntArray) -> None:
        """Note the routes of a layer for the present step's last tokens, shape ``(rows, top_k)`` or ``(top_k,)``."""
        table = routes if routes.ndim == 2 else routes[None]
        rows = min(len(table), self.length - self.step)
        self._routes[self.length - rows : self.length, place, : table.shape[1]] = table[len(table) - rows :]


class Scorer(Protocol):
    """The part of a predictor that computes chances; what it remembers of a sequence is kept for it."""

    def remember(self) -> Any:
        """Return the memory of a new sequence."""

    def forecast(self, memory: Any, history: History) -> Forecast:
        """Predict for the last token of a history that has grown by a step."""

    def refine(
        self, memory: Any, history: History, forecast: Forecast, observed: int, scores: Scores | None
    ) -> Chances:
        """Predict the layers from position `observed` on again, knowing this step's routes before; not in place."""


class SequencePredictor:
    """A route predictor made of a scorer; see :class:`expertier.routing.predictor.RoutePredictor`.

    Parameters
    ----------
    name : str
        By which it is asked for.
    model : RoutedModel
        For which it was trained.
    scorer : Scorer
        Computes the chances.
    """

    def __init__(self, name: str, model: RoutedModel, scorer: Scorer) -> None:
        self.name = name
        self.model = model
        self.scorer = scorer
        self._place = model.position
        self._open: dict[int, _Open] = {}

    @property
    def listens(self) -> bool:
        """Whether :meth:`refine` makes use of what the lookahead says."""
        return bool(getattr(self.scorer, "listens", False))

    @property
    def refines(self) -> bool:
        """Whether :meth:`refine` says more than :meth:`forecast` did."""
        return bool(getattr(self.scorer, "refines", True))

    def forecast(self, sequence: int, tokens: IntArray, *, start: int | None = None) -> Forecast:
        state = self._open.get(sequence)
        if state is None:
            state = self._open[sequence] = _Open(history=History(self.model), memory=self.scorer.remember())
        state.history.grow(np.asarray(tokens), start)
        state.observed = 0
        state.forecast = self.scorer.forecast(state.memory, state.history)
        return state.forecast

    def observe(self, sequence: int, layer: int, routes: IntArray) -> None:
        state = self._open.get(sequence)
        if state is None or state.forecast is None:
            return
        place = self._place[layer]
        state.history.note(place, routes)
        state.observed = place + 1

    def refine(self, sequence: int, scores: Scores | None = None) -> Chances:
        state = self._open[sequence]
        assert state.forecast is not None
        chances = self.scorer.refine(state.memory, state.history, state.forecast, state.observed, scores)
        if state.observed:
            chances = chances.copy() if chances is state.forecast.now else chances
            chances[: state.observed] = 0.0
        return chances

    def forget(self, sequence: int) -> None:
        self._open.pop(sequence, None)


@dataclass
class _Open:
    history: History
    memory: Any
    forecast: Forecast | None = None
    observed: int = 0  # layers of this step whose routes are known
