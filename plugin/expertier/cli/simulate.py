"""``expertier simulate``: policies and budgets on a recorded trace."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from expertier.budget import format_bytes, parse_budget
from expertier.catalog import read_catalog
from expertier.cli.folder import prepare_folder
from expertier.cli.options import print_json
from expertier.errors import BudgetError, UnsupportedOptionError
from expertier.planning.calibrate import measure_disk
from expertier.routing import read_trace
from expertier.simulation.events import load_events
from expertier.simulation.figure import draw_simulation
from expertier.simulation.predicted import Sources
from expertier.simulation.sweep import BELADY, ArmResult, Simulation, plan_arms, sweep
from expertier.simulation.timing import Timing

RECORD = "simulation.json"
FIGURE = "simulation.png"
USUAL_BUDGETS = ("12.5%", "25%", "37.5%", "50%", "75%")
USUAL_POLICIES = ("lfu", "lru")
USUAL_LATENCY = 1e-4
_CALIBRATION_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class SimulateRequest:
    """What the user asked for; see the flags of the command."""

    trace: Path
    budgets: tuple[str, ...]
    policies: tuple[str, ...]
    predictors: tuple[str, ...]
    predictor: Path | None
    model: Path | None
    bandwidth: str | None
    latency_us: float | None
    compute_ms: float | None
    tokens: int | None
    partial: bool
    jobs: int
    out: Path | None
    as_json: bool


def simulate(request: SimulateRequest) -> None:
    """Replay a trace, write record and figure, print the table."""
    trace = read_trace(request.trace, partial=request.partial)
    header = trace.header
    budgets = [(text, _budget(text, header.total_bytes)) for text in request.budgets or USUAL_BUDGETS]
    sources = Sources(predictor=request.predictor, model=request.model)
    arms = plan_arms(budgets, request.policies or USUAL_POLICIES, request.predictors, sources)
    if request.model is not None:
        trace.require_model(read_catalog(request.model).fingerprint, request.model.name)
    events = load_events(trace, most_tokens=request.tokens)  # also reads the notes
    for _, budget in budgets:
        events.check_budget(budget)
    timing, source = find_timing(
        trace.notes,
        model=request.model,
        bandwidth=request.bandwidth,
        compute_ms=request.compute_ms,
        latency_us=request.latency_us,
    )
    if timing is None and request.predictors:
        raise UnsupportedOptionError(
            "Loads ahead of need are a matter of time, and speeds are unknown.", f"Give {_SPEEDS}."
        )
    out = prepare_folder(request.out, "simulations", RECORD)
    with replay_progress(len(arms), TimeRemainingColumn(elapsed_when_finished=True)) as progress:
        results = sweep(
            request.trace,
            arms,
            timing,
            partial=request.partial,
            most_tokens=request.tokens,
            sources=sources,
            jobs=request.jobs,
            progress=progress,
        )
    simulation = Simulation(
        trace=request.trace.name,
        model=header.model or header.architecture,
        fingerprint=header.fingerprint,
        tokens=events.decode_tokens,
        steps=events.decode_steps,
        requests=int((events.set_starts[1:] - events.set_starts[:-1])[events.decode].sum()),
        total_bytes=header.total_bytes,
        timing=timing,
        timing_source=source,
        arms=results,
    )
    simulation.write(out / RECORD)
    draw_simulation(simulation, out / FIGURE)
    if request.as_json:
        print_json({"simulation": simulation, "out": str(out)})
    else:
        _print(simulation, out)


_SPEEDS = "--bandwidth and --compute-ms, or --model for the storage"


def _budget(text: str, total: int) -> int:
    budget = parse_budget(text, total)
    if budget is None:
        raise BudgetError("A simulation needs a budget in figures.", "Write e.g. 25% or 8GiB.")
    return min(budget, total)


def find_timing(
    notes: Mapping[str, Any],
    *,
    model: Path | None = None,
    bandwidth: str | None = None,
    compute_ms: float | None = None,
    latency_us: float | None = None,
) -> tuple[Timing | None, str]:
    """Find speeds, and say where they are from: what was given, else measured on the model, else in a trace's notes.

    Returns
    -------
    timing : Timing or None
        ``None`` where one of them is unknown.
    source : str
        For people.
    """
    disk = notes.get("disk")
    rate: float | None = None
    sources = []
    if bandwidth is not None:
        rate = float(parse_budget(bandwidth.removesuffix("/s"), 1) or 0)
        sources.append("bandwidth as given")
    elif model is not None:
        catalog = read_catalog(model)
        rate = measure_disk(
            catalog.files, read_bytes=catalog.largest_expert_bytes, most_bytes=_CALIBRATION_BYTES
        ).random
        sources.append("storage measured now")
    elif isinstance(disk, dict):
        rate = _number(disk.get("random"))
        sources.append("storage as measured while recording")
    if compute_ms is not None:
        compute: float | None = compute_ms / 1e3
        sources.append("compute as given")
    else:
        compute = _number(notes.get("compute_seconds_per_step"))
        sources.append("compute as measured while recording")
    if not rate or not compute:
        return None, f"speeds unknown; give {_SPEEDS}"
    latency = USUAL_LATENCY if latency_us is None else latency_us / 1e6
    return _with_notes(notes, rate, compute, latency), ", ".join(sources)


def recorded_timing(notes: Mapping[str, Any], *, latency: float) -> Timing | None:
    """Speeds that the recorder left in a trace, if it left all."""
    disk = notes.get("disk")
    bandwidth = _number(disk.get("random")) if isinstance(disk, dict) else None
    compute = _number(notes.get("compute_seconds_per_step"))
    return _with_notes(notes, bandwidth, compute, latency) if bandwidth and compute else None


def _with_notes(notes: Mapping[str, Any], bandwidth: float, compute: float, latency: float) -> Timing:
    share = _number(notes.get("expert_share"))
    return Timing(
        bandwidth=bandwidth,
        compute=compute,
        latency=latency,
        load_cost=_number(notes.get("load_cost_seconds")) or 0.0,
        expert_share=share if share is not None and share <= 1 else 0.8,
    )


def _number(value: Any) -> float | None:
    """What a trace from a stranger claims, if it is a usable number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)


@contextmanager
def replay_progress(arms: int, *more: ProgressColumn) -> Iterator[Callable[[float], None] | None]:
    """Show how many of so many replays are done, on a terminal; `more` columns follow the count."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.completed:.1f} of {task.total:.0f} replays"),
        *more,
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=arms)
        yield lambda done: progress.update(task, completed=done)


def _print(simulation: Simulation, out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(
        f"[bold]{simulation.model}[/]: {simulation.tokens} decoded tokens, "
        f"{format_bytes(simulation.total_bytes)} of experts; {simulation.timing_source}"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ["budget", "arm", "hits, %", "of the LRU-Belady gap", "loads/token", "read/token"]
    if simulation.timing is not None:
        names += ["ms/step", "perfect one layer ahead", "bandwidth bound"]
    for name in names:
        table.add_column(name, justify="left" if name in ("budget", "arm") else "right")
    for budget in dict.fromkeys(arm.budget_text for arm in simulation.arms):
        arms = [arm for arm in simulation.arms if arm.budget_text == budget]
        for index, arm in enumerate(arms):
            row = [
                budget if not index else "",
                arm.label,
                f"{100 * arm.hit_ratio:.1f}",
                _gap(arm, arms),
                f"{arm.loads_per_token:.2f}",
                format_bytes(round(arm.bytes_per_token)),
            ]
            if arm.prefetch_seconds is not None:
                row += [f"{1e3 * arm.prefetch_seconds:.1f}", f"{100 * (arm.ahead_share or 0.0):.0f} % ahead", ""]
            elif arm.seconds is not None:
                times = (arm.seconds.demand, arm.seconds.one_layer, arm.seconds.bound)
                row += [f"{1e3 * seconds:.1f}" for seconds in times]
            table.add_row(*row, style="red" if arm.label == BELADY else "")
    console.print(table)
    console.print(f"[dim]Record: {out / RECORD}   Figure: {out / FIGURE}[/]")


def _gap(arm: ArmResult, arms: list[ArmResult]) -> str:
    by_label = {other.label: other.hit_ratio for other in arms}
    lru, best = by_label.get("lru"), by_label[BELADY]
    if lru is None or best - lru < 1e-9 or arm.label in ("lru", BELADY):
        return ""
    return f"{100 * (arm.hit_ratio - lru) / (best - lru):.0f} %"
