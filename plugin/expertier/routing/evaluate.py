"""How good predictions are: recall and precision for single tokens, per layer and horizon, and how true chances are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertier.routing.lookahead import Lookahead
from expertier.routing.predictor import HORIZONS, Forecast, RoutedModel, RoutePredictor, Scores
from expertier.routing.table import frequency_forecast
from expertier.routing.windows import Windows

BEFORE = "before layer 0"
AHEAD = tuple(f"{count} ahead" for count in (1, 2, 3, 4))
SOON = tuple("next token" if horizon == 1 else f"next {horizon} tokens" for horizon in HORIZONS)
WIDTHS = (1.0, 1.5, 2.0)
"""Candidates, as multiples of the experts a token uses."""

_MOST_NUMBERS = 1 << 24  # kept of one horizon at a time
_BINS = 10

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Quality of one predictor at one horizon on one text.

    Attributes
    ----------
    predictor, horizon, text : str
        Which.
    candidates : tuple of float
        Widths: multiples of the experts per token.
    recall, precision : tuple of tuple of float
        By width, then layer position: share of the used experts that are among the candidates, and of the candidates
        that are used. NaN where a layer has no such horizon.
    calibration_error : float
        Mean distance between chance and share that was used, over bins of chances.
    tokens : int
        Single tokens that were predicted; a batch would only hide errors.
    """

    predictor: str
    horizon: str
    text: str
    candidates: tuple[float, ...]
    recall: tuple[tuple[float, ...], ...]
    precision: tuple[tuple[float, ...], ...]
    calibration_error: float
    tokens: int

    def mean_recall(self, width: float = 1.0) -> float:
        """Over layers."""
        return float(np.nanmean(self.recall[self.candidates.index(width)]))

    def mean_precision(self, width: float = 1.0) -> float:
        """Over layers."""
        return float(np.nanmean(self.precision[self.candidates.index(width)]))


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a predictor said about some text, and what came.

    Attributes
    ----------
    chances : dict of str to ndarray of float32, shape (tokens, layers, experts)
        By horizon; NaN in layers without a prediction of that kind.
    window, offset : ndarray of int64, shape (tokens,)
        Which tokens.
    """

    chances: dict[str, Array]
    window: NDArray[np.int64]
    offset: NDArray[np.int64]


class PreviousToken:
    """A control: the experts of the token before, then those of the one before that, and so on."""

    name = "previous token"

    def __init__(self, model: RoutedModel) -> None:
        self.model = model
        self._shape = model.shape
        self._rank: dict[int, Array] = {}
        self._place = model.position

    def forecast(self, sequence: int, tokens: NDArray[np.int64], *, start: int | None = None) -> Forecast:
        recency = self._rank.setdefault(sequence, np.zeros(self._shape, np.float32))
        recency *= 0.5
        now = np.minimum(recency, 0.999)
        return Forecast(now=now, soon=np.repeat(now[None], len(HORIZONS), 0))

    def observe(self, sequence: int, layer: int, routes: NDArray[np.int64]) -> None:
        self._rank[sequence][self._place[layer], np.atleast_2d(routes)[-1]] = 1.0

    def refine(self, sequence: int, scores: object = None) -> Array:
        return np.minimum(self._rank[sequence], 0.999)

    def forget(self, sequence: int) -> None:
        self._rank.pop(sequence, None)


class StaticFrequency:
    """A control: what is used most in the text that was trained on."""

    name = "static frequency"

    def __init__(self, model: RoutedModel, frequency: Array) -> None:
        self.model = model
        self._forecast = frequency_forecast(frequency)

    def forecast(self, sequence: int, tokens: NDArray[np.int64], *, start: int | None = None) -> Forecast:
        return self._forecast

    def observe(self, sequence: int, layer: int, routes: NDArray[np.int64]) -> None:
        pass

    def refine(self, sequence: int, scores: object = None) -> Array:
        return self._forecast.now

    def forget(self, sequence: int) -> None:
        pass


def watch(
    predictor: RoutePredictor,
    windows: Windows,
    *,
    most_tokens: int = 1 << 30,
    ahead: bool = False,
    lookahead: Lookahead | None = None,
    tick: Callable[[int], None] = lambda tokens: None,
) -> Watched:
    """Let a predictor follow sequences token by token, as decoding does.

    Parameters
    ----------
    predictor : RoutePredictor
        Any; it is asked before layer 0 and, with `ahead`, after every layer.
    windows : Windows
        Each a sequence of its own.
    most_tokens : int
        To predict; fewer for models with very many experts. Windows are taken evenly from all.
    ahead : bool
        Whether the predictor learns something from the layers of the present token.
    lookahead : Lookahead, optional
        Only tokens with sampled router inputs are predicted, and `predictor` is given its scores.
    tick : callable
        Told how many tokens were done.
    """
    layers, experts = windows.model.shape
    limit = min(most_tokens, max(1, _MOST_NUMBERS // (layers * experts)))
    count = min(len(windows), max(1, math.ceil(limit / windows.width)))
    chosen = np.linspace(0, len(windows) - 1, count).astype(np.int64)
    known = windows.known
    sampled = _sampled(windows) if lookahead is not None else {}
    spots = [
        (window, offset)
        for window in (chosen if lookahead is None else range(len(windows)))
        for offset in np.flatnonzero(known[window].all(1))
        if lookahead is None or (window, offset, 0) in sampled
    ][:limit]
    labels = [BEFORE, *SOON, *(AHEAD[: layers - 1] if ahead else ())]
    chances = {label: np.full((len(spots), layers, experts), np.nan, np.float32) for label in labels}
    at = {spot: row for row, spot in enumerate(spots)}
    for window in dict.fromkeys(window for window, _ in spots):
        for offset in range(windows.width):
            if not known[window, offset].any():
                break
            row = at.get((window, offset))
            forecast = predictor.forecast(0, windows.tokens[window, offset : offset + 1])
            if row is not None:
                chances[BEFORE][row] = forecast.now
                for place, label in enumerate(SOON):
                    chances[label][row] = forecast.soon[place]
            for place, layer in enumerate(windows.model.layers):
                routes = windows.routes[window, offset, place, : windows.model.top_k[place]].astype(np.int64)
                if routes[0] < 0:
                    continue
                predictor.observe(0, layer, routes)
                if ahead and row is not None and place + 1 < layers:
                    scores = None
                    if lookahead is not None and (sample := sampled.get((window, offset, place))) is not None:
                        scores = lookahead.scores(layer, sample.astype(np.float32))
                    refined = predictor.refine(0, scores)
                    for distance, label in enumerate(AHEAD[: layers - place - 1], start=1):
                        chances[label][row, place + distance] = refined[place + distance]
        predictor.forget(0)
        tick(windows.width)
    found = np.array(spots, np.int64).reshape(-1, 2)
    return Watched(chances=chances, window=found[:, 0], offset=found[:, 1])


def _sampled(windows: Windows) -> dict[tuple[int, int, int], NDArray[np.float16]]:
    """Router inputs by window, offset and layer position."""
    inputs = windows.inputs
    if inputs is None:
        return {}
    keys = zip(inputs.window.tolist(), inputs.offset.tolist(), inputs.place.tolist(), strict=True)
    return dict(zip(keys, inputs.hidden, strict=True))


class OnlyLookahead:
    """The lookahead by itself, in the form of a predictor: chances in proportion to a softmax of its scores."""

    name = "lookahead"

    def __init__(self, model: RoutedModel) -> None:
        self.model = model
        self._nothing = frequency_forecast(np.full(model.shape, np.nan, np.float32))

    def forecast(self, sequence: int, tokens: NDArray[np.int64], *, start: int | None = None) -> Forecast:
        return self._nothing

    def observe(self, sequence: int, layer: int, routes: NDArray[np.int64]) -> None:
        pass

    def refine(self, sequence: int, scores: Scores | None = None) -> Array:
        chances = self._nothing.now.copy()
        for layer, values in (scores or {}).items():
            place = self.model.position[layer]
            share = np.exp(values - values.max())
            chances[place, : len(values)] = np.minimum(self.model.top_k[place] * share / share.sum(), 1.0)
        return chances

    def forget(self, sequence: int) -> None:
        pass


def truth(windows: Windows, watched: Watched, horizon: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return what was used at a horizon, and for which tokens that is known.

    Returns
    -------
    used : ndarray of bool, shape (tokens, layers, experts)
    known : ndarray of bool, shape (tokens,)
    """
    layers, experts = windows.model.shape
    rows = np.unique(watched.window)
    table = windows.used(rows).astype(bool).reshape(len(rows), windows.width, layers, experts)
    window = np.searchsorted(rows, watched.window)
    if horizon not in SOON:
        return table[window, watched.offset], np.ones(len(window), bool)
    within = HORIZONS[SOON.index(horizon)]
    complete: NDArray[np.bool_] = np.all(windows.known[rows], axis=2)
    used = np.zeros((len(window), layers, experts), bool)
    inside = np.ones(len(window), bool)
    for step in range(1, within + 1):
        later = np.minimum(watched.offset + step, windows.width - 1)
        used |= table[window, later]
        inside &= complete[window, later] & (watched.offset + step < windows.width)
    return used, inside


def score(name: str, text: str, windows: Windows, watched: Watched) -> Iterator[Score]:
    """Compare predictions with what came, horizon by horizon.

    Parameters
    ----------
    name, text : str
        What the scores are called.
    windows : Windows
        The text.
    watched : Watched
        The predictions on it.
    """
    model = windows.model
    for horizon, chances in watched.chances.items():
        used, known = truth(windows, watched, horizon)
        used, given = used[known], chances[known]
        if not len(used):
            continue
        if np.isnan(given[:, :, 0]).all():
            continue
        order = np.argsort(-given, axis=2, kind="stable")
        recalls, precisions = [], []
        for width in WIDTHS:
            recall, precision = [], []
            for place in range(len(model.layers)):
                here = used[:, place]
                if np.isnan(given[0, place, 0]):
                    recall.append(math.nan)
                    precision.append(math.nan)
                    continue
                most = min(round(width * model.top_k[place]), model.experts[place])
                right = np.take_along_axis(here, order[:, place, :most], axis=1).sum()
                recall.append(float(right / max(1, here.sum())))
                precision.append(float(right / (most * len(here))))
            recalls.append(tuple(recall))
            precisions.append(tuple(precision))
        yield Score(
            predictor=name,
            horizon=horizon,
            text=text,
            candidates=WIDTHS,
            recall=tuple(recalls),
            precision=tuple(precisions),
            calibration_error=calibration(given, used, model)[1],
            tokens=len(used),
        )


def calibration(chances: Array, used: NDArray[np.bool_], model: RoutedModel) -> tuple[NDArray[np.float64], float]:
    """Compare chances with what came.

    Returns
    -------
    bins : ndarray of float64, shape (bins, 3)
        Mean chance, share that was used, and number of predictions between 0 and 0.1, 0.1 and 0.2, ...
    error : float
        Mean distance of the first two, weighted by the third.
    """
    valid = ~np.isnan(chances) & model.exists
    p, y = chances[valid].astype(np.float64), used[valid]
    place = np.minimum((p * _BINS).astype(np.int64), _BINS - 1)
    count = np.bincount(place, minlength=_BINS)
    safe = np.maximum(count, 1)
    bins = np.stack(
        [np.bincount(place, p, _BINS) / safe, np.bincount(place, y, _BINS) / safe, count.astype(np.float64)], 1
    )
    return bins, float((np.abs(bins[:, 0] - bins[:, 1]) * count).sum() / max(1, count.sum()))


def find(scores: Sequence[Score], predictor: str, horizon: str, text: str) -> Score | None:
    """Return one of many scores."""
    for item in scores:
        if (item.predictor, item.horizon, item.text) == (predictor, horizon, text):
            return item
    return None
