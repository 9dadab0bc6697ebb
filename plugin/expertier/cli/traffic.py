"""``expertier traffic``: scheduling arms on recorded requests."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from expertier.budget import format_bytes, parse_budget
from expertier.cli.folder import prepare_folder
from expertier.cli.options import print_json
from expertier.cli.simulate import find_timing, replay_progress
from expertier.errors import BudgetError, UnsupportedOptionError
from expertier.routing import read_trace
from expertier.scheduling import CONTROL
from expertier.simulation.requests import Texts
from expertier.simulation.scheduling import RATIOS, TrafficPlan, TrafficRecord, TrafficSimulator, check_arms
from expertier.simulation.traffic_figure import draw_traffic

RECORD = "traffic.json"
FIGURE = "traffic.png"


@dataclass(frozen=True, kw_only=True)
class TrafficRequest:
    """What the user asked for; see the flags of the command."""

    trace: Path
    arms: tuple[str, ...]
    batches: tuple[int, ...]
    budget: str
    plan: TrafficPlan
    prompt: str
    output: str
    load: str | None
    repeats: int
    bandwidth: str | None
    compute_ms: float | None
    token_ms: float
    partial: bool
    out: Path | None
    as_json: bool


def traffic(request: TrafficRequest) -> None:
    """Serve recorded requests under every arm, write record and figure, print the table."""
    arms = check_arms(request.arms)
    plan = read_plan(request.plan, prompt=request.prompt, output=request.output, load=request.load)
    trace = read_trace(request.trace, partial=request.partial)
    total = trace.header.total_bytes
    budget = parse_budget(request.budget, total)
    if budget is None:
        raise BudgetError("A simulation needs a budget in figures.", "Write e.g. 50% or 8GiB.")
    texts = Texts.of_trace(trace)
    timing, source = find_timing(trace.notes, bandwidth=request.bandwidth, compute_ms=request.compute_ms)
    if timing is None:
        raise UnsupportedOptionError(
            "Who waits how long is a matter of time, and speeds are unknown.", "Give --bandwidth and --compute-ms."
        )
    out = prepare_folder(request.out, "traffic", RECORD)
    simulator = TrafficSimulator(trace.header, texts, timing, request.token_ms / 1e3)
    runs = []
    with replay_progress(len(arms) * len(request.batches) * request.repeats) as progress:
        done = 0

        def seen() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done)

        for batch in request.batches:
            for seed in range(request.repeats):
                runs += simulator.run(replace(plan, batch=batch, budget=min(budget, total)), arms, seed, seen)
    record = TrafficRecord(
        trace=request.trace.name,
        model=trace.header.model or trace.header.architecture,
        fingerprint=trace.header.fingerprint,
        plan={**plan.common(), "budget": request.budget, "budget_bytes": budget, "share": budget / total},
        timing=timing,
        timing_source=source,
        token_seconds=request.token_ms / 1e3,
        runs=tuple(runs),
    )
    record.write(out / RECORD)
    show_traffic(record, out, as_json=request.as_json)


def show_traffic(record: TrafficRecord, out: Path, *, as_json: bool) -> None:
    """Draw the figure, print the table."""
    draw_traffic(record, out / FIGURE)
    if as_json:
        print_json({"traffic": record, "out": str(out)})
    else:
        _print(record, out)


def read_plan(plan: TrafficPlan, *, prompt: str, output: str, load: str | None) -> TrafficPlan:
    """Complete a plan with what was given as text.

    Raises
    ------
    UnsupportedOptionError
        Some of it makes no sense.
    """
    return replace(
        plan,
        prompt=_read_span("--prompt", prompt),
        output=_read_span("--output", output),
        load=_check_load(load),
    )


def _read_span(flag: str, text: str) -> tuple[int, int]:
    """Read ``least:most`` tokens, or one number for both.

    Raises
    ------
    UnsupportedOptionError
        It is neither.
    """
    first, _, last = text.partition(":")
    try:
        span = (int(first), int(last or first))
    except ValueError:
        span = (0, 0)
    if not 0 < span[0] <= span[1]:
        raise UnsupportedOptionError(f"{flag} {text} is not a number of tokens.", "Write e.g. 64 or 32:128.")
    return span


def _check_load(text: str | None) -> float | None:
    """Read a part of what can be served: ``70%`` or ``0.7``.

    Raises
    ------
    UnsupportedOptionError
        It is neither.
    """
    if text is None:
        return None
    try:
        load = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        load = 0.0
    if not 0 < load < 10:
        raise UnsupportedOptionError(f"--load {text} is not a part of what can be served.", "Write e.g. 70%.")
    return load


def _print(record: TrafficRecord, out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    load = record.plan["load"]
    asked = f"{record.plan['clients']} clients" if load is None else f"{100 * load:.0f} % load, Poisson"
    console.print(
        f"[bold]{record.model}[/]: {record.plan['requests']} requests, {asked}, budget {record.plan['budget']}; "
        f"{record.timing_source}. Ratios: median (least to most) against {CONTROL}, same requests."
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ("batch", "arm", "loads/token", "read/token", "ratio", "decode steps", "throughput")
    computed = all(run.processor_per_token is not None for run in record.runs)
    for name in (*names, "TTFT p50", "TTFT p99", "answer", "overtaken", *(["CPU/token"] if computed else [])):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for batch in record.batches():
        for index, arm in enumerate(record.arms()):
            runs = record.of(batch, arm)
            loads = sum(run.loads_per_token for run in runs) / len(runs)
            volume = sum(run.bytes_per_token for run in runs) / len(runs)
            ratios = [_ratio(record.ratio(batch, arm, name)) for name in RATIOS]
            table.add_row(
                "" if index else str(batch),
                arm,
                f"{loads:.2f}",
                format_bytes(round(volume)),
                *ratios,
                str(max(run.most_overtaken for run in runs)),
                *([f"{1e3 * median(run.processor_per_token or 0 for run in runs):.1f} ms"] if computed else []),
            )
    console.print(table)
    console.print(f"[dim]Record: {out / RECORD}   Figure: {out / FIGURE}[/]")


def _ratio(found: tuple[float, float, float]) -> str:
    middle, least, most = found
    return f"{middle:.2f}" if least == most else f"{middle:.2f} ({least:.2f}-{most:.2f})"
