"""A predictor beside an engine: it hears of every sequence what it needs, and one that fails is left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from expertier.routing.predictor import Chances, Forecast, RoutePredictor, any_of, merge
from expertier.routing.sequences import Sequences, Span

logger = logging.getLogger("expertier")

_LONGEST: Final = 512  # tokens that a predictor hears of at once: it reads them one by one, before a step may begin


@dataclass(slots=True)
class _Known:
    tokens: list[int] = field(default_factory=list)
    first: int = 0  # the predictor knows those from here ...
    heard: int = 0  # ... to here


class Follower:
    """Tells a predictor what an engine's sequences read and asks it before a step that decodes.

    Parameters
    ----------
    predictor : RoutePredictor
        What predicts.

    Attributes
    ----------
    failure : str
        Why the predictor is not asked any more; empty while it is.

    Notes
    -----
    A prompt needs no prediction, so its tokens are handed over together with the first one that is decoded after them.
    Whatever a predictor raises ends prediction and nothing else: it only moves bytes.
    """

    def __init__(self, predictor: RoutePredictor) -> None:
        self.predictor = predictor
        self.failure = ""
        self._shape = predictor.model.shape
        self._sequences = Sequences(self._forget)
        self._known: dict[int, _Known] = {}
        self._step: list[int] = []  # sequences of the running step that were predicted
        self._rows: list[int] = []  # their rows in it
        self._count = 0  # rows of the running step
        self._told = False
        self._forecast: Forecast | None = None  # of the running step

    @property
    def listens(self) -> bool:
        """Whether the predictor makes use of what the lookahead says (:meth:`refine`)."""
        return bool(getattr(self.predictor, "listens", False))

    @property
    def refines(self) -> bool:
        """Whether :meth:`refine` can say more than the forecast did."""
        return bool(getattr(self.predictor, "refines", True))

    def begin(self, spans: Sequence[Span], *, decode: bool) -> Forecast | None:
        """A step begins.

        Parameters
        ----------
        spans : sequence of Span
            Its tokens.
        decode : bool
            Whether every token is of a different sequence.

        Returns
        -------
        Forecast or None
            Of all its sequences together; ``None`` when nothing is known of any, or for a prompt.
        """
        self._step.clear()
        self._rows.clear()
        if self.failure:
            return None
        try:
            return self._begin(spans, decode)
        except Exception as error:
            self._fail(error)
            return None

    def _begin(self, spans: Sequence[Span], decode: bool) -> Forecast | None:
        forecasts = []
        self._count = len(spans)
        for row, growth in enumerate(self._sequences.step(spans)):
            if growth is None:
                if not self._told:
                    self._told = True
                    logger.info("Input without token ids: routes of such sequences are not predicted.")
                continue
            number = growth.sequence
            known = self._known.setdefault(number, _Known())
            del known.tokens[growth.keep :]
            known.tokens.extend(growth.tokens.tolist())
            known.heard = min(known.heard, growth.keep)
            if not decode:
                continue
            start = self._catch_up(number, known)
            forecast = self.predictor.forecast(number, np.array(known.tokens[start:], np.int64), start=start)
            known.heard = len(known.tokens)
            if forecast.now.shape != self._shape:
                raise ValueError(f"a forecast of shape {forecast.now.shape} for experts of shape {self._shape}")
            forecasts.append(forecast)
            self._step.append(number)
            self._rows.append(row)
        self._forecast = merge(forecasts) if forecasts else None
        return self._forecast

    def _catch_up(self, number: int, known: _Known) -> int:
        """From which position on the predictor has to be told a sequence's tokens."""
        start = known.heard
        if start <= known.first:
            self.predictor.forget(number)
            start = known.first = 0
        if len(known.tokens) - start > _LONGEST:
            start = known.first = len(known.tokens) - _LONGEST  # beyond what it knows: there it begins anew
        return start

    def observe(self, layer: int, routes: NDArray[np.int64]) -> None:
        """Note what the router of a layer chose, shape ``(rows, top_k)``; only steps that were predicted count."""
        if not self._step or len(routes) != self._count:
            return
        try:
            for number, row in zip(self._step, self._rows, strict=True):
                self.predictor.observe(number, layer, routes[row : row + 1])
        except Exception as error:
            self._fail(error)

    def refine(self, scores: Sequence[Mapping[int, NDArray[np.float32]] | None] | None = None) -> Chances | None:
        """Chances for the layers of this step that were not observed yet; those of other layers mean nothing.

        Parameters
        ----------
        scores : sequence of mappings, optional
            For every row of the step what the lookahead says about later layers.

        Returns
        -------
        ndarray of float32, shape (layers, experts), or None
            ``None`` when this step was not predicted.
        """
        if not self._step or self._forecast is None:
            return None
        if not self.refines:
            return self._forecast.now
        if scores is not None and len(scores) != self._count:
            scores = None
        try:
            refined = [
                self.predictor.refine(number, scores[row] if scores is not None else None)
                for number, row in zip(self._step, self._rows, strict=True)
            ]
        except Exception as error:
            self._fail(error)
            return None
        return refined[0] if len(refined) == 1 else any_of(refined)

    def _forget(self, number: int) -> None:
        self._known.pop(number, None)
        if not self.failure:
            self.predictor.forget(number)

    def _fail(self, error: Exception) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        self._step.clear()
        logger.warning("The route predictor %s failed and is not asked any more: %s", self.predictor.name, self.failure)
