"""Which predictor a run uses: the option ``predictor`` becomes one that is loaded, or none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from expertier.catalog.routers import Weights, read_routers, routers_digest
from expertier.catalog.types import Catalog
from expertier.config import OffloadOptions
from expertier.errors import PredictorError, PredictorMissingError
from expertier.routing.predictor import RoutedModel, RoutePredictor
from expertier.routing.saved import MANIFEST, NAMES, load_predictor

logger = logging.getLogger("expertier")

Routers = Callable[[], Mapping[int, Weights]]

_FOLDER: Final = "predictor-"


def open_predictor(
    option: str, catalog: Catalog, directories: Sequence[Path], routers: Routers | None = None
) -> RoutePredictor | None:
    """Load the predictor that was asked for.

    Parameters
    ----------
    option : str
        ``off``; ``auto``: one that was trained for this model and lies in one of `directories`, or none; the name of a
        predictor there; a folder that ``expertier train`` has written; or such a folder and, behind a slash, the name
        of one of its predictors.
    catalog : Catalog
        The model.
    directories : sequence of Path
        Where sidecars of the model may lie.
    routers : callable, optional
        Gives the model's router weights, if somebody else needs them, too; called only if a predictor may be there.

    Raises
    ------
    PredictorError
        What was asked for by name is not there, or cannot be used for this model. What ``auto`` finds and cannot use is
        left alone, with a warning.
    """
    if option == "off":
        return None
    if option == "auto" and not any(map(_has_any, directories)):
        return None
    weights = read_routers(catalog) if routers is None else routers()
    model = RoutedModel.of_catalog(catalog, routers_digest(weights, tuple(catalog.by_layer)))
    if option == "auto" or option in NAMES:
        name = NAMES[0] if option == "auto" else option
        for directory in directories:
            folder = directory / predictor_folder(model)
            if os.path.isfile(folder / MANIFEST):
                try:
                    return load_predictor(folder, model, name)
                except PredictorError as error:
                    if option != "auto":
                        raise
                    logger.warning("The predictor in %s is left alone: %s", folder, error)
        if option == "auto":
            return None
        raise PredictorMissingError(
            f"No predictor {option!r} was trained for {catalog.path.name}; looked in "
            f"{', '.join(str(directory / predictor_folder(model)) for directory in directories)}.",
            "Train one with `expertier train`, or choose 'auto' or 'off'.",
        )
    path = Path(option).expanduser()
    # A Path's own method raises where a folder may not be looked into.
    if not os.path.isfile(path / MANIFEST) and os.path.isfile(path.parent / MANIFEST):
        return load_predictor(path.parent, model, path.name)
    return load_predictor(path, model)


def _has_any(place: Path) -> bool:
    try:
        return any(place.glob(f"{_FOLDER}*/{MANIFEST}"))
    except OSError:  # nobody may look into it
        return False


def predictor_folder(model: RoutedModel) -> str:
    """Name of the folder that holds a model's predictors, the same for all its conversions."""
    return f"{_FOLDER}{(model.routers or model.fingerprint)[:12]}"


def policy_for(options: OffloadOptions, predictor: RoutePredictor | None, *, lossy: bool) -> str:
    """Eviction policy for the option ``policy``.

    Parameters
    ----------
    options : OffloadOptions
        What the user set.
    predictor : RoutePredictor or None
        What predicts whole paths.
    lossy : bool
        Whether stand-ins are possible: what they cost was measured under a policy that needs no predictor.
    """
    return "predictive" if options.policy == "auto" and predictor is not None and not lossy else options.plain_policy


def gate_mode(
    lookahead: Literal["auto", "on", "off"], predictor: RoutePredictor | None
) -> Literal["auto", "on", "off"]:
    """How the gate works for the option ``lookahead``; a predictor without the lookahead still has to pay."""
    return "auto" if lookahead == "off" and predictor is not None else lookahead
