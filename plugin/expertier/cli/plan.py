"""``expertier plan``."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table

from expertier.budget import format_bytes, parse_budget
from expertier.catalog import read_catalog
from expertier.catalog.types import Catalog
from expertier.cli.calibration import calibrate_engine
from expertier.cli.engines import EngineSettings
from expertier.cli.folder import prepare_folder
from expertier.cli.options import print_json, write_json
from expertier.cli.plan_figure import draw_trade_off
from expertier.cli.profile import trace_path
from expertier.cli.simulate import USUAL_LATENCY, recorded_timing, replay_progress
from expertier.config import OffloadOptions
from expertier.config_file import write_config
from expertier.errors import RoutingDemandError, UnsupportedOptionError
from expertier.paths import cache_dir
from expertier.planning.calibrate import measure_disk
from expertier.planning.demand import RoutingDemand, read_demand
from expertier.planning.memory import memory_limits
from expertier.planning.plan import Plan, make_plan
from expertier.planning.planner import TradeOff, trade_off
from expertier.planning.speed import EngineSpeed, read_speed
from expertier.quality.planning import plan_quality
from expertier.routing import read_trace
from expertier.simulation import load_events
from expertier.simulation.demand import summarise
from expertier.simulation.replay import policy_name

RECORD = "plan.json"
FIGURE = "plan.png"
_NO_PROFILE = (
    "no profile of this model exists, so only the floor of uniform routing is known; trained routers repeat themselves "
    "and hit more often"
)


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What the user asked for; see the flags of the command."""

    model: Path
    options: OffloadOptions
    routes: Path | None
    calibrate: bool
    engine: str
    settings: EngineSettings
    out: Path | None
    apply: Path | None
    measure: bool
    as_json: bool


def plan(request: PlanRequest) -> None:
    """Print what a budget means; with a profile also draw what every budget gives."""
    options, n_ubatch = request.options, request.settings.n_ubatch
    catalog = read_catalog(request.model)
    limits = memory_limits()
    # Refuse before measuring: nobody wants to wait for a refusal.
    result = make_plan(catalog, options.budget, limits=limits, margin=options.margin, n_ubatch=n_ubatch)
    quality = plan_quality(options, catalog)
    routes = find_routes(catalog, request.routes)
    if request.calibrate and routes is None:
        raise UnsupportedOptionError(
            f"No routes of {catalog.path.name} were recorded, and the engine's speed is of use only with them.",
            "Record some: expertier profile MODEL --text FILE. Or leave out --calibrate.",
        )
    out = None if routes is None and request.out is None else prepare_folder(request.out, "plans", RECORD)
    if request.measure:
        with Status("measuring the storage", console=Console(stderr=True)):
            disk = measure_disk(
                catalog.files,
                read_bytes=catalog.largest_expert_bytes,
                threads=options.io_threads,
                mode=options.io_mode,
            )
        result = make_plan(catalog, options.budget, limits=limits, disk=disk, margin=options.margin, n_ubatch=n_ubatch)
    found, speed = None, None
    if routes is not None and out is not None:
        profile = load_routes(routes, catalog, policy=options.plain_policy, half_life=options.half_life)
        speed = _speed(request, catalog, routes)
        found = trade_off(
            profile,
            min(parse_budget(options.budget, profile.total_bytes) or result.budget_bytes, profile.total_bytes),
            smallest=min(profile.smallest_bytes, catalog.smallest_budget()),
            largest=limits[0].left - catalog.other_bytes,
            speed=speed,
            quality=quality,
            most_rise=0.0 if quality is None else quality.budget.value,
        )
        draw_trade_off(found, catalog.path.stem, out / FIGURE)
    record = {
        "model": _model(catalog),
        "plan": result,
        "profile": None if found is None else {"routes": str(routes), "speed": speed, "trade_off": found},
        "hit_ratio_basis": _NO_PROFILE if found is None else "replays of recorded routes",
    }
    if out is not None:
        write_json(out / RECORD, record)
    if request.apply is not None:
        _apply(request.apply, catalog, result, found, options)
    if request.as_json:
        print_json(record)
    else:
        _print(catalog, result, found, out)


def find_routes(catalog: Catalog, given: Path | None) -> Path | None:
    """Where the model's recorded routes are: as given, or where `expertier profile` puts them."""
    if given is not None:
        return given
    usual = trace_path(catalog)
    return usual if usual.exists() else None


def load_routes(path: Path, catalog: Catalog, *, policy: str = "lfu", half_life: float | None = None) -> RoutingDemand:
    """Read a summary of routes under an eviction policy, or make it from a trace and keep it beside that.

    Raises
    ------
    RoutingDemandError, TraceError
        The file is neither, or of another model or policy.
    """
    name = policy_name(policy, half_life)
    if path.suffix == ".json":
        given = read_demand(path)
        given.require_model(catalog.fingerprint, catalog.path.name)
        if given.policy != name:
            raise RoutingDemandError(
                f"{path} says what routes ask for under the policy {given.policy}, not {name}.",
                "Name the trace itself with --routes.",
            )
        return given
    trace = read_trace(path)
    trace.require_model(catalog.fingerprint, catalog.path.name)
    kept = path.with_name(f"{path.name}{'' if name == 'lfu' else f'.{name}'}.demand.json")
    with suppress(RoutingDemandError, OSError):
        if kept.stat().st_mtime >= path.stat().st_mtime:
            known = read_demand(kept)
            known.require_model(catalog.fingerprint, catalog.path.name)
            return known
    with replay_progress(1) as progress:
        found = summarise(
            load_events(trace, most_tokens=_MOST_TOKENS), policy=policy, half_life=half_life, seen=progress
        )
    with suppress(OSError):  # a folder that cannot be written to costs the replays again
        found.write(kept)
    return found


_MOST_TOKENS = 6000  # replays of more change the curve by less than texts differ


def _speed(request: PlanRequest, catalog: Catalog, routes: Path) -> EngineSpeed | None:
    """Speeds measured now, kept from last time, or those left in the trace by its recorder."""
    place = cache_dir() / "speeds"
    kept = place / f"{catalog.fingerprint[:12]}-{request.engine}-{request.settings.threads}.json"
    if request.calibrate:
        with Status("measuring the engine", console=Console(stderr=True)):
            speed = calibrate_engine(
                request.model, catalog, request.options, engine=request.engine, settings=request.settings
            )
        place.mkdir(parents=True, exist_ok=True)
        speed.write(kept)
        return speed
    if kept.exists():
        speed = read_speed(kept)
        if speed.fingerprint == catalog.fingerprint:
            return speed
    if routes.suffix == ".json":
        return None
    timing = recorded_timing(read_trace(routes, least_tokens=1).notes, latency=USUAL_LATENCY)
    if timing is None:
        return None
    expert = catalog.total_expert_bytes / catalog.expert_count
    return EngineSpeed(
        engine=request.engine,
        fingerprint=catalog.fingerprint,
        threads=request.settings.threads,
        resident_seconds=timing.compute,
        managed_seconds=timing.compute,
        load_seconds=timing.load_cost + expert / timing.bandwidth,
    )


def _apply(path: Path, catalog: Catalog, result: Plan, found: TradeOff | None, options: OffloadOptions) -> None:
    """Write what was planned, and whatever else was asked for, as a file of options."""
    chosen = options.changed()
    chosen.pop("config", None)
    expected: dict[str, object] = {}
    # Budget auto is left to the engine: it alone knows what is left when everything else has its memory.
    if parse_budget(options.budget, catalog.total_expert_bytes) is not None:
        chosen["budget"] = result.budget_bytes if found is None else found.chosen.budget_bytes
    if found is not None:
        expected = asdict(found.chosen)
    write_config(path, chosen, {"model": catalog.path.name, "fingerprint": catalog.fingerprint, "expected": expected})


def _model(catalog: Catalog) -> dict[str, object]:
    return {
        "path": str(catalog.path),
        "fingerprint": catalog.fingerprint,
        "architecture": catalog.architecture,
        "file_bytes": catalog.file_bytes,
        "block_count": catalog.block_count,
        "layers": [
            {
                "layer": layer.layer,
                "experts": layer.experts,
                "top_k": layer.top_k,
                "expert_bytes": layer.expert_bytes,
                "types": [part.type_name for part in layer.parts],
            }
            for layer in catalog.layers
        ],
    }


def _print(catalog: Catalog, plan: Plan, found: TradeOff | None, out: Path | None) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(catalog, plan, known=found is not None):
        table.add_row(name, text)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(table)
    if found is not None:
        _print_trade_off(console, found)
    if out is not None:
        console.print(f"[dim]Record: {out}/{RECORD}" + (f"   Figure: {out}/{FIGURE}[/]" if found else "[/]"))


def _print_trade_off(console: Console, found: TradeOff) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    timed = found.chosen.tokens_per_second is not None
    for name in ("", "experts", "budget", "hits, %", "loads/token", "read/token", *["tok/s"] * timed, "bias", "ppl, %"):
        table.add_column(name, justify="right")
    shown = (*found.curve[: -1 : max(1, len(found.curve) // 8)], found.curve[-1])
    rows = [*((False, point) for point in shown), (True, found.chosen)]
    for asked, point in sorted(rows, key=lambda row: row[1].budget_bytes):
        table.add_row(
            "asked for" if asked else "too much" if point.budget_bytes > found.largest_bytes else "",
            f"{100 * point.share:.0f} %",
            format_bytes(point.budget_bytes),
            f"{100 * point.hit_ratio:.1f}",
            f"{point.loads_per_token:.2f}",
            format_bytes(round(point.bytes_per_token)),
            *([f"{point.tokens_per_second:.1f}"] if point.tokens_per_second is not None else []),
            f"{point.setting.bias:g}",
            f"+{100 * point.setting.perplexity_rise:.2f}",
            style="bold" if asked else "",
        )
    console.print(table)
    layers = found.layers
    verdict = "a fixed division would pay" if layers.quotas_pay else "the shared pool is as good"
    console.print(
        f"layers ask for {', '.join(map(str, layers.slots))} experts ({verdict}: {layers.loads_saved:+.2f} loads per "
        f"token saved); prompts stream through {format_bytes(layers.staging_bytes)}"
        + ("" if layers.prefetch_width is None else f"; compute of a layer hides {layers.prefetch_width} loads")
    )
    console.print(
        f"possible here: {format_bytes(found.smallest_bytes)} to "
        f"{format_bytes(min(found.largest_bytes, found.curve[-1].budget_bytes))}"
    )


def _rows(catalog: Catalog, plan: Plan, *, known: bool) -> list[tuple[str, str]]:
    kinds = ", ".join(sorted({part.type_name for layer in catalog.layers for part in layer.parts}))
    counts = _span([layer.experts for layer in catalog.layers])
    sizes, rest = _span_bytes([layer.expert_bytes for layer in catalog.layers]), format_bytes(plan.other_bytes)
    used = _span([layer.top_k for layer in catalog.layers])
    dense = catalog.block_count - len(catalog.layers)
    about = "about " if plan.budget_is_estimate else ""
    rows = [
        (
            "model",
            f"{catalog.architecture}, {len(catalog.layers)} layers with {counts} experts each, {used} per token"
            + (f", {dense} dense layers" if dense else ""),
        ),
        (
            "expert",
            f"{sizes} ({kinds}); all together {format_bytes(plan.total_bytes)}, everything else {rest}",
        ),
        (
            "budget",
            f"{about}{format_bytes(plan.budget_bytes)} = {plan.resident_experts} of {plan.total_experts} experts "
            f"({100 * plan.uniform_hit_ratio:.0f} %)"
            + ("; the engine's own buffers come off it when it has loaded" if plan.budget_is_estimate else ""),
        ),
        (
            "smallest budget",
            f"{format_bytes(plan.smallest_bytes)} for one token, {format_bytes(plan.full_step_bytes)} for any prompt "
            f"step of {plan.n_ubatch} tokens"
            + (
                ""
                if plan.safe_ubatch >= plan.n_ubatch
                else f"; this budget is sure to hold steps of {plan.safe_ubatch}"
            ),
        ),
        ("memory", f"{format_bytes(plan.memory.left)} left ({plan.memory.source})"),
    ]
    if plan.disk is not None:
        rows.append(
            (
                "storage",
                f"{format_bytes(int(plan.disk.random))}/s in reads of one expert, "
                f"{format_bytes(int(plan.disk.sequential))}/s in sequence" + ("" if plan.disk.direct else ", cached"),
            )
        )
    if known:  # the table below says more
        return rows
    if plan.uniform_hit_ratio >= 1:
        rows.append(("hits", "100 % once every expert has been used; nothing is read any more after that"))
        return rows
    rows.append(("hits", f"at least about {100 * plan.uniform_hit_ratio:.0f} % ({_NO_PROFILE})"))
    speed = (
        ""
        if plan.uniform_tokens_per_second is None
        else f": reading alone then allows {plan.uniform_tokens_per_second:.1f} tok/s (compute not known yet)"
    )
    floor = format_bytes(int(plan.uniform_missed_bytes))
    needs = f"one token needs {format_bytes(plan.token_bytes)} of experts and at that floor reads {floor}{speed}"
    rows.append(("speed", needs))
    return rows


def _span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _span_bytes(values: list[int]) -> str:
    low, high = min(values), max(values)
    return format_bytes(low) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"
