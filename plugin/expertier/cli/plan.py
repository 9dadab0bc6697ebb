"""``expertier plan``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table

from expertier.budget import format_bytes
from expertier.catalog import read_catalog
from expertier.catalog.types import Catalog
from expertier.cli.options import print_json
from expertier.config import OffloadOptions
from expertier.planning.calibrate import measure_disk
from expertier.planning.memory import memory_limits
from expertier.planning.plan import Plan, make_plan

_NO_PROFILE = (
    "no profile of this model exists, so only the floor of uniform routing is known; trained routers repeat themselves "
    "and hit more often"
)


def plan(model: Path, options: OffloadOptions, *, n_ubatch: int, measure: bool, as_json: bool) -> None:
    """Print what a budget means."""
    catalog = read_catalog(model)
    limits = memory_limits()
    # Refuse before measuring: nobody wants to wait for a refusal.
    result = make_plan(catalog, options.budget, limits=limits, margin=options.margin, n_ubatch=n_ubatch)
    if measure:
        with Status("measuring the storage", console=Console(stderr=True)):
            disk = measure_disk(
                catalog.files,
                read_bytes=catalog.largest_expert_bytes,
                threads=options.io_threads,
                mode=options.io_mode,
            )
        result = make_plan(catalog, options.budget, limits=limits, disk=disk, margin=options.margin, n_ubatch=n_ubatch)
    if as_json:
        print_json({"model": _model(catalog), "plan": asdict(result), "profile": None, "hit_ratio_basis": _NO_PROFILE})
    else:
        _print(catalog, result)


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


def _print(catalog: Catalog, plan: Plan) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(catalog, plan):
        table.add_row(name, text)
    Console().print(table)


def _rows(catalog: Catalog, plan: Plan) -> list[tuple[str, str]]:
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
