"""What a route predictor is: chances for every expert of every layer, before the first layer of a step runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.errors import PredictorMismatchError

if TYPE_CHECKING:
    from expertier.catalog.types import Catalog
    from expertier.routing.trace_format import TraceHeader

IntArray = NDArray[np.int64]
Chances = NDArray[np.float32]
"""Chances by layer position and expert, shape ``(layers, most experts)``; experts a layer does not have have 0."""

Scores = Mapping[int, NDArray[np.float32]]
"""What the lookahead says about some later layers: layer index to the scores of its experts, shape ``(experts,)``."""

HORIZONS: Final = (1, 4, 16)
"""Within how many tokens after the present one :attr:`Forecast.soon` looks."""


@dataclass(frozen=True, kw_only=True)
class RoutedModel:
    """The model whose routes are predicted.

    Attributes
    ----------
    layers : tuple of int
        Indices of the transformer layers with routed experts, ascending.
    experts, top_k : tuple of int
        Of each of them.
    routers : str
        Digest of the router weights (:func:`expertier.catalog.routers.routers_digest`), empty if unknown. Conversions
        and widened copies of a model share it, so they share predictors.
    fingerprint : str
        Of the very files, as in :class:`expertier.catalog.types.Catalog`; decides where `routers` is unknown.
    name : str
        For messages.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    routers: str = ""
    fingerprint: str = ""
    name: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of :data:`Chances`."""
        return len(self.layers), max(self.experts)

    @property
    def position(self) -> dict[int, int]:
        """Layer index to its row in :data:`Chances`."""
        return {layer: place for place, layer in enumerate(self.layers)}

    @property
    def exists(self) -> NDArray[np.bool_]:
        """Which cells of :data:`Chances` are experts."""
        return np.arange(max(self.experts)) < np.array(self.experts)[:, None]

    @classmethod
    def of_catalog(cls, catalog: Catalog, routers: str = "") -> RoutedModel:
        """Describe a model on storage."""
        return cls(
            layers=tuple(layer.layer for layer in catalog.layers),
            experts=tuple(layer.experts for layer in catalog.layers),
            top_k=tuple(layer.top_k for layer in catalog.layers),
            routers=routers,
            fingerprint=catalog.fingerprint,
            name=catalog.path.name,
        )

    @classmethod
    def of_trace(cls, header: TraceHeader) -> RoutedModel:
        """Describe the model of a trace."""
        return cls(
            layers=tuple(layer.layer for layer in header.layers),
            experts=tuple(layer.experts for layer in header.layers),
            top_k=tuple(layer.top_k for layer in header.layers),
            routers=header.routers,
            fingerprint=header.fingerprint,
            name=header.model or header.architecture,
        )

    def same_routes(self, other: RoutedModel) -> bool:
        """Whether both choose the same experts for the same text."""
        if (self.layers, self.experts, self.top_k) != (other.layers, other.experts, other.top_k):
            return False
        if self.routers and other.routers:
            return self.routers == other.routers
        return bool(self.fingerprint) and self.fingerprint == other.fingerprint

    def require(self, other: RoutedModel, what: str) -> None:
        """Refuse `what`, which was made for `other`, where that is another model.

        Raises
        ------
        PredictorMismatchError
            It is; the message says in what they differ.
        """
        if self.same_routes(other):
            return
        way_out = "Train one for this model with `expertier train`."
        here, there = self.name or "this model", other.name or "another model"
        for field, words in (("layers", "layers"), ("experts", "experts per layer"), ("top_k", "experts per token")):
            mine, its = getattr(self, field), getattr(other, field)
            if mine != its:
                raise PredictorMismatchError(
                    f"{what} was trained for {there} with {_shown(its)} {words}; {here} has {_shown(mine)}.", way_out
                )
        raise PredictorMismatchError(f"{what} was trained for {there}, whose routers are not those of {here}.", way_out)


def _shown(values: tuple[int, ...]) -> str:
    if len(set(values)) == 1:
        return str(values[0])
    return str(len(values)) if len(set(values)) == len(values) else str(list(values))


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is likely to be used, as known before the first layer of a step runs.

    Attributes
    ----------
    now : ndarray of float32, shape (layers, experts)
        Chance that the step uses the expert.
    soon : ndarray of float32, shape (len(HORIZONS), layers, experts)
        Chance that it is used at least once within the next :data:`HORIZONS` tokens after this step.
    """

    now: Chances
    soon: Chances


class RoutePredictor(Protocol):
    """Predicts the routes of sequences that grow, step after step.

    Attributes
    ----------
    name : str
        By which it is asked for.
    model : RoutedModel
        For which it was trained.

    Notes
    -----
    A step calls :meth:`forecast` once for each of its sequences before layer 0, then :meth:`observe` as routers choose.
    Sequences are independent of one another and any number may be open. Not thread-safe.
    """

    name: str
    model: RoutedModel

    def forecast(self, sequence: int, tokens: IntArray, *, start: int | None = None) -> Forecast:
        """Let a sequence grow and predict.

        Parameters
        ----------
        sequence : int
            Whatever number the adapter knows it by; a new one begins a new sequence.
        tokens : ndarray of int, shape (n,)
            Ids of the tokens this step computes, n at least 1. The forecast is about the last of them: a prompt needs
            whole layers anyway.
        start : int, optional
            Position of the first of them. What was known of the sequence from there on is forgotten: a prompt that
            shares its beginning, or drafted tokens that were rejected, need nothing else. Beyond the known end (a
            cache was restored from elsewhere) the sequence begins anew. ``None`` appends.
        """

    def observe(self, sequence: int, layer: int, routes: IntArray) -> None:
        """Note what a router chose in the step of the last :meth:`forecast`.

        Parameters
        ----------
        sequence : int
            A sequence of this step.
        layer : int
            Index of the transformer layer.
        routes : ndarray of int, shape (rows, top_k) or (top_k,)
            Experts of the step's tokens; fewer rows than tokens are the last ones.
        """

    def refine(self, sequence: int, scores: Scores | None = None) -> Chances:
        """Chances for the layers of this step that were not observed yet, in the light of those that were.

        Parameters
        ----------
        sequence : int
            A sequence of this step.
        scores : Scores, optional
            From :meth:`expertier.routing.lookahead.Lookahead.scores`; predictors that do not listen to it ignore it.

        Returns
        -------
        ndarray of float32, shape (layers, experts)
            Like :attr:`Forecast.now`, 0 for layers that were observed.
        """

    def forget(self, sequence: int) -> None:
        """Drop what is known about a sequence; one that is not known is no error."""


def merge(forecasts: Sequence[Forecast]) -> Forecast:
    """Combine the forecasts of a step's sequences: chances that at least one of them uses an expert.

    The sequences are taken to be independent.

    Parameters
    ----------
    forecasts : sequence of Forecast
        At least one.
    """
    if len(forecasts) == 1:
        return forecasts[0]
    return Forecast(
        **{field.name: any_of([getattr(one, field.name) for one in forecasts]) for field in fields(Forecast)}
    )


def any_of(chances: Sequence[Chances]) -> Chances:
    """Chances that at least one of several independent events happens, elementwise."""
    missing: Chances = 1.0 - chances[0]
    for more in chances[1:]:
        missing *= 1.0 - more
    np.subtract(1.0, missing, out=missing)
    return missing
