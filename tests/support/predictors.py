"""Predictors that tests can rely on to be right, wrong or broken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.routing.predictor import HORIZONS, Forecast, RoutedModel


class FixedPredictor:
    """Says the same chances for every token, and writes down what it is told.

    Parameters
    ----------
    model : RoutedModel
        The model.
    chances : array_like of float, shape (layers, experts)
        What it says.
    """

    name = "fixed"

    def __init__(self, model: RoutedModel, chances: Any) -> None:
        self.model = model
        self.chances = np.asarray(chances, np.float32)
        self.sequences: dict[int, list[int]] = {}
        self.observed: list[tuple[int, int, list[Any]]] = []
        self.forgotten: list[int] = []
        self._passed = np.zeros(len(model.layers), bool)

    def forecast(self, sequence: int, tokens: NDArray[np.int64], *, start: int | None = None) -> Forecast:
        known = self.sequences.setdefault(sequence, [])
        if start is not None:
            assert start <= len(known), "the tokens between are missing"
            del known[start:]
        known.extend(tokens.tolist())
        self._passed[:] = False
        return Forecast(now=self.chances, soon=np.stack([self.chances] * len(HORIZONS)))

    def observe(self, sequence: int, layer: int, routes: NDArray[np.int64]) -> None:
        self.observed.append((sequence, layer, routes.tolist()))
        self._passed[self.model.position[layer]] = True

    def refine(self, sequence: int, scores: Mapping[int, NDArray[np.float32]] | None = None) -> NDArray[np.float32]:
        return np.where(self._passed[:, None], np.float32(0), self.chances)

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)
        self.sequences.pop(sequence, None)


class WrongPredictor(FixedPredictor):
    """Is sure, at every layer, that the experts chosen least recently come next: the opposite of what is likely."""

    name = "wrong"

    def __init__(self, model: RoutedModel) -> None:
        super().__init__(model, np.ones(model.shape))
        self._last = np.zeros(model.shape)
        self._now = 0

    def forecast(self, sequence: int, tokens: NDArray[np.int64], *, start: int | None = None) -> Forecast:
        self._now += 1
        oldest = np.argsort(self._last, axis=1)[:, : self.model.top_k[0]]
        self.chances = np.zeros(self.model.shape, np.float32)
        np.put_along_axis(self.chances, oldest, 1.0, axis=1)
        return super().forecast(sequence, tokens, start=start)

    def observe(self, sequence: int, layer: int, routes: NDArray[np.int64]) -> None:
        super().observe(sequence, layer, routes)
        self._last[self.model.position[layer], routes.ravel()] = self._now


class BrokenPredictor(FixedPredictor):
    """Fails when it is asked for the so-manyth time."""

    name = "broken"

    def __init__(self, model: RoutedModel, *, at: str = "forecast", calls: int = 1) -> None:
        super().__init__(model, np.ones(model.shape))
        self._at = at
        self._left = calls

    def _call(self, name: str) -> None:
        if name == self._at:
            self._left -= 1
            if self._left <= 0:
                raise FloatingPointError("a weight is not a number")

    def forecast(self, sequence: int, tokens: NDArray[np.int64], *, start: int | None = None) -> Forecast:
        self._call("forecast")
        return super().forecast(sequence, tokens, start=start)

    def observe(self, sequence: int, layer: int, routes: NDArray[np.int64]) -> None:
        self._call("observe")
        super().observe(sequence, layer, routes)

    def refine(self, sequence: int, scores: Mapping[int, NDArray[np.float32]] | None = None) -> NDArray[np.float32]:
        self._call("refine")
        return super().refine(sequence, scores)

    def forget(self, sequence: int) -> None:
        self._call("forget")
        super().forget(sequence)
