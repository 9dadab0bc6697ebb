"""``expertier report TRACE``: pictures of recorded routes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from expertier.budget import format_bytes
from expertier.cli.folder import prepare_folder
from expertier.cli.options import print_json
from expertier.cli.simulate import USUAL_LATENCY, recorded_timing, replay_progress
from expertier.comparison.hardware import cores
from expertier.errors import UnsupportedOptionError
from expertier.routing import Trace, read_trace
from expertier.routing.evaluate import BEFORE, SOON, calibration, truth, watch
from expertier.routing.predictor import RoutedModel
from expertier.routing.saved import load_predictor
from expertier.routing.windows import read_windows
from expertier.simulation.analysis import reuse_distances, skew, time_line, usage
from expertier.simulation.events import Events, load_events
from expertier.simulation.pictures import (
    draw_calibration,
    draw_heat_map,
    draw_hits,
    draw_reuse,
    draw_time_line,
    write_page,
)
from expertier.simulation.replay import replay
from expertier.simulation.sweep import ArmResult, plan_arms, sweep

_PAGE = "report.html"
_SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_POLICIES = ("lfu", "lru")
_MOST_TOKENS = 20_000  # more make the curves no smoother
_LINE_TOKENS, _LINE_SHARE = 6, 0.25
_PREDICTED_TOKENS = 2000  # of which chances are held against what came


def report_trace(path: Path, out: Path | None, *, predictor: Path | None, partial: bool, as_json: bool) -> None:
    """Draw heat map, reuse, hit ratios, a time line and how true a predictor is; write one page with all of them."""
    trace = read_trace(path, partial=partial)
    events = load_events(trace, most_tokens=_MOST_TOKENS)
    chances = None if predictor is None else _calibration(trace, predictor)
    folder = prepare_folder(out or path.with_name(path.name + "-report"), "reports", _PAGE)
    total = events.header.total_bytes
    budgets = [(f"{100 * share:g}%", int(total * share)) for share in _SHARES]
    budgets = [(text, budget) for text, budget in budgets if budget >= events.least_budget] or [("100%", total)]
    arms = plan_arms(budgets, _POLICIES, ())
    with replay_progress(len(arms)) as progress:
        results = sweep(path, arms, None, partial=partial, most_tokens=_MOST_TOKENS, jobs=cores(), progress=progress)
    pictures = _draw(trace, events, results, budgets, folder)
    if chances is not None:
        pictures.append(folder / "calibration.png")
        draw_calibration(chances, pictures[-1])
    found = skew(events)
    page = folder / _PAGE
    write_page(
        page,
        f"Routes of {events.header.model or events.header.architecture}",
        _facts(trace, events),
        {
            "Skew": [
                ("layer", "entropy, bits", "routes to the hottest quarter", "shared with the token before"),
                *((str(s.layer), f"{s.entropy:.2f}", f"{s.hottest_quarter:.0%}", f"{s.repeated:.0%}") for s in found),
            ],
            "Hit ratio, %": _hit_table(results),
        },
        pictures,
    )
    if as_json:
        print_json(
            {
                "trace": str(path),
                "tokens": events.decode_tokens,
                "skew": [asdict(item) for item in found],
                "arms": results,
                "calibration": None if chances is None else {name: bins.tolist() for name, bins in chances.items()},
                "page": str(page),
                "pictures": [str(picture) for picture in pictures],
            }
        )
        return
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    for name, value in _facts(trace, events):
        console.print(f"[bold]{name:<10}[/] {value}")
    console.print(f"{page}   [dim]and {', '.join(picture.name for picture in pictures)}[/]")


def _calibration(trace: Trace, folder: Path) -> dict[str, NDArray[np.float64]]:
    """Let a trained predictor follow the trace; by horizon, what it said and what came (:func:`calibration`)."""
    windows, tokens = read_windows([trace])
    if not tokens:
        raise UnsupportedOptionError(
            "This trace has no token ids, and a predictor of paths reads tokens.",
            "Record one with `expertier profile ... --trace-tokens on`.",
        )
    model = RoutedModel.of_trace(trace.header)
    watched = watch(load_predictor(folder, model), windows, most_tokens=_PREDICTED_TOKENS)
    found = {}
    for horizon in (BEFORE, *SOON):
        used, known = truth(windows, watched, horizon)
        if known.any():
            found[horizon] = calibration(watched.chances[horizon][known], used[known], model)[0]
    return found


def _draw(
    trace: Trace, events: Events, results: tuple[ArmResult, ...], budgets: list[tuple[str, int]], folder: Path
) -> list[Path]:
    header = events.header
    names = ["experts.png", "reuse.png", "hits.png"]
    pictures = [folder / name for name in names]
    draw_heat_map(usage(events), [layer.layer for layer in header.layers], pictures[0])
    draw_reuse(reuse_distances(events), header.total_experts, pictures[1])
    curves: dict[str, list[tuple[float, float]]] = {}
    for arm in results:
        curves.setdefault(arm.label, []).append((arm.share, arm.hit_ratio))
    draw_hits(curves, pictures[2])
    timing = recorded_timing(trace.notes, latency=USUAL_LATENCY)
    if timing is not None:
        text, budget = min(budgets, key=lambda item: abs(item[1] / header.total_bytes - _LINE_SHARE))
        found = replay(events, _POLICIES[0], budget)
        turns = time_line(
            events, found.misses, timing.transfer(found), timing.layer_compute(events), tokens=_LINE_TOKENS
        )
        pictures.append(folder / "timeline.png")
        draw_time_line(turns, f"{_POLICIES[0]}, {text} of all experts resident, no prefetch", pictures[-1])
    return pictures


def _facts(trace: Trace, events: Events) -> list[tuple[str, str]]:
    header = events.header
    layers = header.layers
    count, top_k = (max(getattr(layer, name) for layer in layers) for name in ("experts", "top_k"))
    shape = f"{len(layers)} layers of {count}, {top_k} per token, together {format_bytes(header.total_bytes)}"
    return [
        ("model", f"{header.model}, {header.architecture}, fingerprint {header.fingerprint[:16]}"),
        ("experts", shape),
        ("trace", f"{trace.path.name}: {events.decode_tokens} decoded tokens, recorded with {header.engine}"),
    ]


def _hit_table(results: tuple[ArmResult, ...]) -> list[tuple[str, ...]]:
    labels = list(dict.fromkeys(arm.label for arm in results))
    budgets = list(dict.fromkeys(arm.budget_text for arm in results))
    cells = {(arm.label, arm.budget_text): f"{100 * arm.hit_ratio:.1f}" for arm in results}
    return [("resident", *budgets), *((label, *(cells[label, budget] for budget in budgets)) for label in labels)]
