"""Which predictor a run uses: the option ``predictor`` becomes one that is loaded, or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from expertier.catalog.types import Catalog
from expertier.errors import PredictorMissingError
from expertier.routing.predictor import RoutePredictor


def open_predictor(option: str, catalog: Catalog, directories: Sequence[Path]) -> RoutePredictor | None:
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

    Raises
    ------
    PredictorError
        What was asked for by name is not there, or cannot be used for this model. What ``auto`` finds and cannot use is
        left alone, with a warning.
    """
    if option in ("off", "auto"):
        return None
    raise PredictorMissingError(
        f"There is no trained predictor {option!r} for {catalog.path.name}.", "Choose 'auto' or 'off'."
    )


def gate_mode(
    lookahead: Literal["auto", "on", "off"], predictor: RoutePredictor | None
) -> Literal["auto", "on", "off"]:
    """How the gate works for the option ``lookahead``; a predictor without the lookahead still has to pay."""
    return "auto" if lookahead == "off" and predictor is not None else lookahead
