"""``expertier profile --quality``: measures what stand-ins cost and writes the model's quality profile."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from expertier.budget import parse_budget
from expertier.catalog import read_catalog
from expertier.catalog.types import Catalog
from expertier.cli.engines import Adapter, EngineSettings, get_adapter
from expertier.cli.options import print_json
from expertier.cli.profile import given_texts
from expertier.config import OffloadOptions
from expertier.errors import BudgetError, QualityProfileError, UnsupportedEngineError, UnsupportedOptionError
from expertier.quality.calibration import Adjustable, Calibration, CalibrationPlan, calibrate, check_texts, point_of
from expertier.quality.evaluation import Reference, Sample, evaluate, samples
from expertier.quality.profile import Point, QualityProfile, merged, profile_paths, read_profile
from expertier.quality.proxy import fit

USUAL_LEVELS = ("12.5%", "25%", "50%", "75%")
_PROTECTS = (0,)  # a share of gate weight protects the heaviest experts by itself


@dataclass(frozen=True, kw_only=True)
class QualityRequest:
    """What the user asked for; see the flags of the command."""

    model: Path
    options: OffloadOptions
    texts: tuple[Path, ...]
    out: Path | None
    engine: str
    levels: tuple[str, ...]
    count: int
    per_text: int
    points: int
    hard: bool
    settings: EngineSettings
    as_json: bool


def profile_quality(request: QualityRequest) -> None:
    """Measure and write a quality profile."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    adapter = get_adapter(request.engine)
    texts = given_texts(request.texts, "to measure quality on")
    catalog = read_catalog(request.model)
    given = ("quality_budget", "virtual_bias", "virtual_protect")
    if any(getattr(request.options, name) is not None for name in given) or request.options.virtual_hard == "on":
        raise UnsupportedOptionError(
            "A quality profile measures many settings of virtual experts by itself.",
            "Leave out --quality-budget and the --virtual options; --hard measures hard mode, too.",
        )
    budgets = _budgets(request, catalog)
    path = request.out or profile_paths(catalog, request.options.sidecar_dir)[0]
    plan = CalibrationPlan(
        budgets=budgets, total_bytes=catalog.total_expert_bytes, protects=_PROTECTS, points=request.points
    )
    with _session(adapter, request, budgets[0]) as session:
        chosen = samples(session, texts, count=request.count, tokens=request.per_text)
        check_texts(chosen)
        per_pass = sum(len(text.tokens) - 1 for text in chosen)
        hard_passes = len(budgets) if request.hard else 0
        with _progress(per_pass * (plan.passes + hard_passes)) as (advance, tell):
            tell("the exact model")
            session.set_virtual(0.0, 0)
            with Reference(session, chosen, advance) as reference:
                measured = Calibration()
                for budget in budgets:  # written after each of them: an interrupt loses one at most
                    measured += calibrate(session, reference, replace(plan, budgets=(budget,)), advance, tell)
                    profile = _write(_profile(request, adapter, catalog, chosen, measured, []), path, catalog)
                if request.hard:
                    hard = _measure_hard(adapter, request, budgets, plan, reference, advance, tell)
                    profile = _write(_profile(request, adapter, catalog, chosen, measured, hard), path, catalog)
    _report(request, profile, path)


def _budgets(request: QualityRequest, catalog: Catalog) -> list[int]:
    """Memory budgets in bytes, largest first."""
    least = max(layer.top_k * layer.expert_bytes for layer in catalog.layers)
    found = []
    for level in request.levels or USUAL_LEVELS:
        amount = parse_budget(level, catalog.total_expert_bytes)
        if amount is None:
            raise BudgetError("Quality is measured at definite budgets, not at 'auto'.", "Write e.g. --at 25%.")
        if amount >= least:
            found.append(min(amount, catalog.total_expert_bytes))
        elif request.levels:
            raise BudgetError(
                f"--at {level} cannot hold the experts one token needs in a layer.", f"Give at least {least} bytes."
            )
    return sorted(set(found), reverse=True)


@contextmanager
def _session(adapter: Adapter, request: QualityRequest, budget: int, *, hard: bool = False) -> Iterator[Adjustable]:
    virtual: dict[str, Any] = {"virtual_hard": "on"} if hard else {"virtual_bias": 0.0, "virtual_hard": "off"}
    options = replace(request.options.untraced(), budget=budget, quality_budget=None, **virtual)
    settings = replace(request.settings, n_ctx=request.settings.n_ctx or request.per_text)
    session = adapter.open(request.model, options, settings)
    try:
        if not isinstance(session, Adjustable):
            raise UnsupportedEngineError(
                f"The adapter for {adapter.engine} cannot measure quality yet.", "Use --engine llamacpp."
            )
        yield session
    finally:
        session.close()


def _measure_hard(
    adapter: Adapter,
    request: QualityRequest,
    budgets: list[int],
    plan: CalibrationPlan,
    reference: Reference,
    advance: Callable[[int], None],
    tell: Callable[[str], None],
) -> list[Point]:
    found = []
    with _session(adapter, request, budgets[0], hard=True) as session:
        for budget in budgets:
            share = budget / plan.total_bytes
            tell(f"{100 * share:.0f} % resident, hard mode")
            session.resize(budget)
            result = evaluate(session, reference, warm_up=reference.texts[-1].tokens, advance=advance)
            found.append(point_of(result, share=share, bias=0.0, protect=0, hard=True))
    return found


def _write(profile: QualityProfile, path: Path, catalog: Catalog) -> QualityProfile:
    with contextlib.suppress(QualityProfileError):
        profile = merged(read_profile(path, catalog), profile)
    profile.write(path)
    return profile


def _profile(
    request: QualityRequest,
    adapter: Adapter,
    catalog: Catalog,
    chosen: tuple[Sample, ...],
    measured: Calibration,
    hard: list[Point],
) -> QualityProfile:
    return QualityProfile(
        fingerprint=catalog.fingerprint,
        model=catalog.path.name,
        engine=adapter.engine,
        policy=request.options.plain_policy,
        texts=len(chosen),
        tokens=measured.evaluations[0].tokens,
        domains=tuple(dict.fromkeys(text.domain for text in chosen)),
        text_digest=hashlib.sha256(json.dumps([text.tokens for text in chosen]).encode()).hexdigest(),
        exact_cross_entropy=measured.evaluations[0].exact_cross_entropy,
        points=(*measured.points, *hard),
        proxy=fit(measured.evaluations),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _report(request: QualityRequest, profile: QualityProfile, path: Path) -> None:
    if request.as_json:
        print_json({"profile": asdict(profile), "out": str(path)})
        return
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(
        f"{profile.model}: {profile.texts} texts of {len(profile.domains)} kinds, {profile.tokens} tokens decoded one "
        f"by one in every setting; exact perplexity {math.exp(profile.exact_cross_entropy):.3f}"
    )
    table = Table(header_style="dim", expand=False)
    for name in ("resident", "bias", "protected"):
        table.add_column(name, justify="right")
    for name in ("loads/token", "perplexity", "at most (95 %)", "KL", "same token", "gate mass"):
        table.add_column(name, justify="right")
    for point in sorted(profile.points, key=lambda point: (-point.share, point.hard, point.protect, point.bias)):
        table.add_row(
            f"{100 * point.share:.4g} %",
            "hard" if point.hard else f"{point.bias:.3g}",
            str(point.protect) if point.bias else "",
            f"{point.loads_per_token:.2f}",
            f"{100 * point.increase.middle:+.2f} %",
            f"{100 * point.increase.high:+.2f} %",
            f"{point.kl.middle:.4f}",
            f"{100 * point.agreement:.1f} %",
            f"{100 * sum(point.substituted) / len(point.substituted):.1f} %",
        )
    console.print(table)
    console.print(f"[dim]{path}; next: --quality-budget 1%[/]")


@contextmanager
def _progress(tokens: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """A bar over all passes on a terminal, one line per pass elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def count(number: int) -> None:
            nonlocal done
            done += number

        yield count, lambda text: print(f"[{100 * done // max(tokens, 1)} %] {text}", file=sys.stderr, flush=True)
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=tokens)
        yield (
            lambda number: progress.advance(task, number),
            lambda text: progress.update(task, description=text),
        )
