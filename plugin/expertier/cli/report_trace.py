"""``expertier report TRACE``: pictures of recorded routes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from expertier.budget import format_bytes
from expertier.cli.folder import prepare_folder
from expertier.cli.options import print_json
from expertier.cli.simulate import USUAL_LATENCY, recorded_timing, replay_progress
from expertier.comparison.hardware import cores
from expertier.routing import Trace, read_trace
from expertier.simulation.analysis import reuse_distances, skew, time_line, usage
from expertier.simulation.events import Events, load_events
from expertier.simulation.pictures import draw_heat_map, draw_hits, draw_reuse, draw_time_line, write_page
from expertier.simulation.replay import replay
from expertier.simulation.sweep import ArmResult, plan_arms, sweep

_PAGE = "report.html"
_SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_POLICIES = ("lfu", "lru")
_MOST_TOKENS = 20_000  # more make the curves no smoother
_LINE_TOKENS, _LINE_SHARE = 6, 0.25


def report_trace(path: Path, out: Path | None, *, partial: bool, as_json: bool) -> None:
    """Draw heat map, reuse distances, hit ratios and a time line; write one page with all of them."""
    trace = read_trace(path, partial=partial)
    events = load_events(trace, most_tokens=_MOST_TOKENS)
    folder = prepare_folder(out or path.with_name(path.name + "-report"), "reports", _PAGE)
    total = events.header.total_bytes
    budgets = [(f"{100 * share:g}%", int(total * share)) for share in _SHARES]
    budgets = [(text, budget) for text, budget in budgets if budget >= events.least_budget] or [("100%", total)]
    arms = plan_arms(budgets, _POLICIES, ())
    with replay_progress(len(arms)) as progress:
        results = sweep(path, arms, None, partial=partial, most_tokens=_MOST_TOKENS, jobs=cores(), progress=progress)
    pictures = _draw(trace, events, results, budgets, folder)
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
                "page": str(page),
                "pictures": [str(picture) for picture in pictures],
            }
        )
        return
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    for name, value in _facts(trace, events):
        console.print(f"[bold]{name:<10}[/] {value}")
    console.print(f"{page}   [dim]and {', '.join(picture.name for picture in pictures)}[/]")


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
