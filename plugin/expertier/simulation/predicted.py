"""Replays with trained predictors and the lookahead, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.catalog import read_catalog
from expertier.catalog.routers import read_routers
from expertier.errors import UnsupportedOptionError
from expertier.manager import OffloadManager
from expertier.routing.gate import GainGate
from expertier.routing.lookahead import Lookahead
from expertier.routing.predictor import RoutedModel, RoutePredictor
from expertier.routing.saved import load_predictor
from expertier.simulation.events import Events
from expertier.simulation.loads import AdapterLoads
from expertier.simulation.prefetch import LoadsOn

LOOKAHEAD = "lookahead"
TRAINED = ("tokens", "table", "path", "blend")
FORECASTER = "blend"
"""Who tells the policy ``predictive`` what is coming."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where predictions come from.

    Attributes
    ----------
    predictor : Path or None
        Folder that ``expertier train`` has written.
    model : Path or None
        The model, whose routers the lookahead applies.
    """

    predictor: Path | None = None
    model: Path | None = None

    def check(self, name: str) -> None:
        """Refuse what cannot be predicted by.

        Parameters
        ----------
        name : str
            Names of :data:`TRAINED` and ``lookahead``, joined by ``+``.

        Raises
        ------
        UnsupportedOptionError
            There is no such predictor, or what it needs was not given.
        """
        parts = name.split("+")
        known = (*TRAINED, LOOKAHEAD)
        if unknown := [part for part in parts if part not in known]:
            raise UnsupportedOptionError(f"There is no predictor {unknown[0]!r}.", f"Choose from: {', '.join(known)}.")
        if sum(part in TRAINED for part in parts) > 1:
            raise UnsupportedOptionError(f"{name!r} names two trained predictors.", "'blend' is made of all of them.")
        for part in parts:
            if part == LOOKAHEAD and self.model is None:
                raise UnsupportedOptionError("The lookahead applies the model's own routers.", "Give --model.")
            if part != LOOKAHEAD and self.predictor is None:
                raise UnsupportedOptionError(
                    f"The predictor {part!r} has to be trained.",
                    "Give the folder that `expertier train` has written: --predictor.",
                )

    def trained(self, events: Events, name: str = FORECASTER) -> RoutePredictor:
        """Read a trained predictor for the model of a trace."""
        assert self.predictor is not None
        return load_predictor(self.predictor, RoutedModel.of_trace(events.header), name)

    def loads(self, events: Events, name: str, **options: Any) -> LoadsOn:
        """Load ahead by a predictor, as the adapters do; `options` are those of :class:`AdapterLoads`."""
        self.check(name)
        parts = name.split("+")
        trained = [part for part in parts if part != LOOKAHEAD]
        predictor = self.trained(events, trained[0]) if trained else None
        lookahead = None
        if LOOKAHEAD in parts:
            assert self.model is not None
            lookahead = Lookahead(
                gates=_routers(self.model),
                norms={},
                top_k={layer.layer: layer.top_k for layer in events.header.layers},
            )
        return lambda manager: AdapterLoads(
            events, manager, predictor=predictor, lookahead=lookahead, clock=lambda: manager.disk.now, **options
        )

    def forecasts(self, events: Events) -> Callable[[OffloadManager], AdapterLoads]:
        """Tell the policy what is coming, and load nothing ahead."""
        predictor = self.trained(events)
        return lambda manager: AdapterLoads(events, manager, predictor=predictor, gate=GainGate("off"), load=False)


@cache
def _routers(model: Path) -> dict[int, NDArray[np.float32]]:
    return read_routers(read_catalog(model))
