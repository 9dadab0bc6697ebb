"""Training of all predictors from traces: count, learn, and fit the mixture on text that neither has seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from expertier.routing.blend import DISTANCES, INPUTS, PARTS, BlendWeights, fit_logistic, logit
from expertier.routing.evaluate import (
    AHEAD,
    BEFORE,
    SOON,
    OnlyLookahead,
    PreviousToken,
    Score,
    StaticFrequency,
    Watched,
    score,
    truth,
    watch,
)
from expertier.routing.lookahead import Lookahead
from expertier.routing.path import PathShape
from expertier.routing.predictor import HORIZONS
from expertier.routing.saved import Trained
from expertier.routing.table import count_layers, count_tokens, frequency_forecast
from expertier.routing.windows import Windows, require_requests

_KEPT_BACK: Final = 12  # one request in so many is kept from learning, and as many are for stopping and fitting
_FIT_TOKENS: Final = 3000  # the mixture has few weights
_MOST_SAMPLES: Final = 200_000
_LEAST_SAMPLED: Final = 100  # tokens with router inputs; of fewer nothing is learnt about the lookahead

Progress = Callable[[str, float, str], None]
"""Told what is being done, which share of it is done, and how it goes."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What is trained, and for how long.

    Attributes
    ----------
    seconds : float
        Most time for the network.
    epochs : int
        Most passes of the network over the text.
    width : int
        Numbers per token in the network.
    seed : int
        Of everything random.
    """

    seconds: float = 300.0
    epochs: int = 20
    width: int = 192
    seed: int = 0


def train(
    windows: Windows,
    *,
    tokens: bool,
    settings: TrainSettings | None = None,
    vocabulary: int = 0,
    embedding: NDArray[np.float32] | None = None,
    lookahead: Lookahead | None = None,
    progress: Progress = lambda what, share, words: None,
) -> tuple[Trained, Windows]:
    """Train every predictor the traces allow.

    Parameters
    ----------
    windows : Windows
        What was recorded.
    tokens : bool
        Whether they have token ids; without them there are only the table and its mixture with the frequencies.
    settings : TrainSettings, optional
        For how long.
    vocabulary : int
        Token ids of the model; 0 takes those that occur.
    embedding : ndarray of float32, shape (vocabulary, hidden), optional
        The model's token embedding, which the network starts from.
    lookahead : Lookahead, optional
        The model's; the mixture learns how far to trust it, if the traces have samples of its inputs.
    progress : callable
        Told how it goes.

    Returns
    -------
    trained : Trained
        All predictors.
    kept_back : Windows
        Text that none of them has learnt from, for a report.

    Raises
    ------
    TraceTooShortError
        There are too few sequences to keep some back.
    ModuleNotFoundError
        torch is not installed.
    """
    settings = settings or TrainSettings()
    require_requests(windows)
    parts = min(_KEPT_BACK, len(np.unique(windows.request)) // 2)
    rest, kept_back = windows.split(parts)
    learn, fit = rest.split(max(2, parts - 1))
    facts: dict[str, Any] = {"tokens": learn.count, "seed": settings.seed}
    progress("count", 0.0, f"{learn.count} tokens")
    table = count_layers(learn)
    counts = path = None
    if tokens:
        vocabulary = max(vocabulary, int(windows.tokens.max()) + 1, 0 if embedding is None else len(embedding))
        counts = count_tokens(learn, vocabulary)
        from expertier.routing.train_path import PathTraining, train_path

        shape = PathShape(
            vocabulary=vocabulary, layers=windows.model.shape[0], experts=windows.model.shape[1], width=settings.width
        )
        result = train_path(
            shape,
            learn,
            fit,
            counts=counts,
            settings=PathTraining(seconds=settings.seconds, epochs=settings.epochs, seed=settings.seed),
            embedding=embedding,
            progress=lambda share, words: progress("path", share, words),
        )
        path = (result.shape, result.weights)
        facts |= {"path_loss": result.loss, "path_tokens": result.tokens, "path_seconds": round(result.seconds, 1)}
    blend = BlendWeights(
        now=np.zeros((2, DISTANCES, len(windows.model.layers), len(INPUTS)), np.float32),
        soon=np.zeros((len(HORIZONS), len(windows.model.layers), 3), np.float32),
    )
    trained = Trained(model=windows.model, table=table, blend=blend, tokens=counts, path=path, facts=facts)
    progress("blend", 0.0, "")
    fitted = fit_blend(trained, fit, lookahead, tick=lambda share: progress("blend", share, ""))
    return replace(trained, blend=fitted), kept_back


def fit_blend(
    trained: Trained,
    fit: Windows,
    lookahead: Lookahead | None = None,
    *,
    tick: Callable[[float], None] = lambda share: None,
) -> BlendWeights:
    """Fit the weights of the mixture.

    Parameters
    ----------
    trained : Trained
        The parts.
    fit : Windows
        Text that they have not learnt from.
    lookahead : Lookahead, optional
        The model's, for texts with samples of its inputs.
    tick : callable
        Told the share that is done.
    """
    layers = len(trained.model.layers)
    names = [name for name in PARTS if name in trained.names]
    now = np.zeros((2, DISTANCES, layers, len(INPUTS)), np.float32)
    watched = _watch_parts(trained, names, fit, None)
    tick(0.5)
    now[:] = _fit_now(trained, watched, fit)
    if lookahead is not None and fit.inputs is not None:
        sampled = _watch_parts(trained, names, fit, lookahead)
        if len(sampled["lookahead"].window) >= _LEAST_SAMPLED:
            now[1, 1:] = _fit_now(trained, sampled, fit)[1:]
    tick(0.9)
    soon = np.zeros((len(HORIZONS), layers, 3), np.float32)
    any_watched = watched[names[0]]
    steady = frequency_forecast(trained.table.frequency).soon
    exists = trained.model.exists
    for which, label in enumerate(SOON):
        used, known = truth(fit, any_watched, label)
        for place in range(layers):
            inputs = {"frequency": np.broadcast_to(steady[which, place], used[known, place].shape)}
            if "path" in watched:
                inputs["path"] = watched["path"].chances[label][known, place]
            weights = _fit(inputs, used[known, place], exists[place])
            soon[which, place, 1], soon[which, place, 2] = weights[0], weights[-1]
            if "path" in watched:
                soon[which, place, 0] = weights[1]
    tick(1.0)
    return BlendWeights(now=now, soon=soon)


def _watch_parts(
    trained: Trained, names: Sequence[str], fit: Windows, lookahead: Lookahead | None
) -> dict[str, Watched]:
    predictors: dict[str, Any] = {name: trained.predictor(name) for name in names}
    if lookahead is not None:
        predictors["lookahead"] = OnlyLookahead(trained.model)
    return {
        name: watch(predictor, fit, most_tokens=_FIT_TOKENS, ahead=name in ("table", "lookahead"), lookahead=lookahead)
        for name, predictor in predictors.items()
    }


def _fit_now(trained: Trained, watched: dict[str, Watched], fit: Windows) -> NDArray[np.float32]:
    """Fit the weights of the present step, shape ``(DISTANCES, layers, len(INPUTS))``."""
    layers = len(trained.model.layers)
    found = np.zeros((DISTANCES, layers, len(INPUTS)), np.float32)
    frequency, exists = trained.table.frequency, trained.model.exists
    used, _ = truth(fit, next(iter(watched.values())), BEFORE)
    for distance in range(DISTANCES):
        for place in range(distance, layers):  # those before have no layer so far before them
            inputs = {"frequency": np.broadcast_to(frequency[place], used[:, place].shape)}
            for name, what in watched.items():
                if name in ("table", "lookahead"):
                    if distance:
                        inputs[name] = what.chances[AHEAD[distance - 1]][:, place]
                else:
                    inputs[name] = what.chances[BEFORE][:, place]
            weights = _fit(inputs, used[:, place], exists[place])
            for name, weight in zip([*inputs, "constant"], weights, strict=True):
                found[distance, place, INPUTS.index(name)] = weight
            if "lookahead" in inputs:  # chances are proportional to the softmax that BlendScorer takes
                top_k = trained.model.top_k[place]
                found[distance, place, INPUTS.index("constant")] += (
                    np.log(top_k) * weights[list(inputs).index("lookahead")]
                )
    return found


def _fit(
    chances: dict[str, NDArray[np.float32]], used: NDArray[np.bool_], exists: NDArray[np.bool_]
) -> NDArray[np.float64]:
    columns = []
    for name, item in chances.items():
        given = np.ascontiguousarray(item[:, exists])
        columns.append((np.log(np.maximum(given, 1e-9)) if name == "lookahead" else logit(given)).ravel())
    inputs = np.stack([*columns, np.ones_like(columns[0])], 1).astype(np.float64)
    wanted = used[:, exists].ravel()
    step = max(1, math.ceil(len(inputs) / _MOST_SAMPLES))
    return fit_logistic(inputs[::step], wanted[::step])


def report(
    trained: Trained,
    texts: Sequence[tuple[str, Windows]],
    *,
    most_tokens: int = 20_000,
    lookahead: Lookahead | None = None,
    progress: Progress = lambda what, share, words: None,
) -> list[Score]:
    """Score every predictor and two controls on some texts.

    Parameters
    ----------
    trained : Trained
        The predictors.
    texts : sequence of (str, Windows)
        Name and contents, not trained on.
    most_tokens : int
        Of each text.
    lookahead : Lookahead, optional
        Scored, too, by itself and in the mixture, on texts with samples of its inputs.
    progress : callable
        Told how it goes.
    """
    predictors: list[Any] = [trained.predictor(name) for name in trained.names]
    predictors += [PreviousToken(trained.model), StaticFrequency(trained.model, trained.table.frequency)]
    scores: list[Score] = []
    for index, (text, windows) in enumerate(texts):
        for place, predictor in enumerate(predictors):
            progress("report", (index * len(predictors) + place) / (len(texts) * len(predictors)), predictor.name)
            watched = watch(predictor, windows, most_tokens=most_tokens, ahead=predictor.name in ("table", "blend"))
            scores += score(predictor.name, text, windows, watched)
        if lookahead is not None and windows.inputs is not None:
            blend = trained.predictor()
            for name, predictor in (("lookahead", OnlyLookahead(trained.model)), ("blend + lookahead", blend)):
                watched = watch(predictor, windows, most_tokens=most_tokens, ahead=True, lookahead=lookahead)
                chances = {label: given for label, given in watched.chances.items() if label in AHEAD}
                scores += score(name, text, windows, replace(watched, chances=chances))
    progress("report", 1.0, "")
    return scores
