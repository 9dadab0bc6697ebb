"""What ``expertier compare --ablate`` adds: its arms, and the bounds that the simulator gives for the same texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertier.catalog.sidecar import sidecar_directories
from expertier.catalog.types import Catalog
from expertier.cli.engines import Adapter, EngineSettings
from expertier.cli.profile import Measured, Reader, expert_share, read_all
from expertier.comparison.ablation import PREDICTORS, ablation, bounds
from expertier.comparison.prompts import Text
from expertier.comparison.records import ArmRecord, Comparison
from expertier.config import OffloadOptions
from expertier.errors import PredictorMissingError
from expertier.routing.opening import open_predictor

ROUTES = "routes.trace"


def ablation_variants(catalog: Catalog, options: OffloadOptions) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Arms by name with what makes them, and what has to be said about them.

    Raises
    ------
    PredictorError
        A predictor was asked for by name and cannot be used.
    """
    beside = catalog.path if catalog.path.is_dir() else catalog.path.parent
    directories = sidecar_directories(beside, options.sidecar_dir)
    named = options.predictor not in ("auto", "off")
    found: dict[str, str] = {}
    for name in PREDICTORS:
        asked = f"{options.predictor}/{name}" if named else name
        try:
            open_predictor(asked, catalog, directories)
        except PredictorMissingError:
            continue
        found[name] = asked
    if named and not found:
        open_predictor(options.predictor, catalog, directories)  # says what is wrong with it
    missing = [name for name in PREDICTORS if name not in found]
    notes = (f"not trained, and so left out: {', '.join(missing)} (see expertier train)",) if missing else ()
    return ablation(catalog, found), notes


def without_whole(arms: Sequence[ArmRecord], keys: Sequence[str]) -> tuple[ArmRecord, ...]:
    """Stock's arms and those of the ablation; Expertier as it comes is one of them under another name."""
    return tuple(arm for arm in arms if not arm.ours or arm.key.removeprefix("expertier-") in keys)


def with_bounds(
    comparison: Comparison,
    adapter: Adapter,
    options: OffloadOptions,
    texts: Sequence[Text],
    out: Path,
    *,
    per_text: int,
    settings: EngineSettings,
    catalog: Catalog,
) -> Comparison:
    """Record the routes of the texts that were decoded, replay them at the budgets that the arms had.

    An engine whose adapter cannot be fed given tokens gets no bounds, and a note that says so.
    """
    prompt = comparison.settings.short_prompt
    trace = out / ROUTES
    trace.unlink(missing_ok=True)
    print("recording the routes of the texts, for the bounds", file=sys.stderr, flush=True)
    chosen = replace(options, budget="50%", trace=str(trace), predictor="off", profile="off")
    session = adapter.open(catalog.path, chosen, replace(settings, n_ctx=prompt + per_text))
    measured = Measured()
    try:
        if not isinstance(session, Reader):
            note = f"{adapter.engine} cannot be fed given tokens yet, so there are no bounds"
            return replace(comparison, notes=(*comparison.notes, note))
        total = len(texts) * (prompt + per_text)
        read_all(session, list(texts), measured, tokens=total, per_text=prompt + per_text, prompt=prompt)
    finally:
        session.close()
    return replace(
        comparison, bounds=bounds(comparison, trace, {**measured.costs(), "expert_share": expert_share(catalog)})
    )
