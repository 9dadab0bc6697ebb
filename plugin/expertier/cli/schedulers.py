"""``expertier compare --scheduler``: scheduling arms in a real engine."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from expertier.catalog import read_catalog
from expertier.cli.engines import EngineSettings, get_adapter
from expertier.cli.folder import prepare_folder
from expertier.cli.traffic import RECORD, read_plan, show_traffic
from expertier.comparison.prompts import find_texts
from expertier.comparison.schedulers import SchedulerComparison
from expertier.comparison.traffic import read_request_log
from expertier.config import OffloadOptions
from expertier.simulation.scheduling import REAL_ARMS, TrafficPlan, TrafficRecord, TrafficRun, check_arms

_USUAL_BUDGET = "50%"


@dataclass(frozen=True, kw_only=True)
class SchedulersRequest:
    """What the user asked for; see the flags of the command."""

    model: Path
    options: OffloadOptions
    engine: str
    arms: tuple[str, ...]
    batches: tuple[int, ...]
    plan: TrafficPlan
    prompt: str
    output: str
    load: str | None
    log: Path | None
    rounds: int
    side_by_side: bool
    texts: tuple[Path, ...]
    out: Path | None
    n_ubatch: int
    threads: int
    as_json: bool


def compare_schedulers(request: SchedulersRequest) -> None:
    """Serve the same requests under every scheduler, in turns; write record and figure, print the table."""
    arms = check_arms(request.arms, REAL_ARMS)
    adapter = get_adapter(request.engine)
    catalog = read_catalog(request.model)
    plan = read_plan(request.plan, prompt=request.prompt, output=request.output, load=request.load)
    options = request.options
    if options.budget == "auto":  # where everything fits there is nothing to schedule for
        options = replace(options, budget=_USUAL_BUDGET)
    if options.profile == "auto":
        options = replace(options, profile="off")  # a run must not learn from the one before, whose texts are the same
    source, texts = find_texts(request.texts, request.model)
    out = prepare_folder(request.out, "traffic", RECORD)
    settings = EngineSettings(n_ubatch=request.n_ubatch, threads=request.threads)
    runs: list[TrafficRun] = []
    record: TrafficRecord | None = None
    for batch in request.batches:
        context = plan.prompt[1] + plan.output[1]
        with contextlib.ExitStack() as stack:
            servers = []
            for _ in arms if request.side_by_side else arms[:1]:
                servers.append(adapter.open_traffic(catalog.path, options, settings, batch=batch, context=context))
                stack.callback(servers[-1].close)
            stats = servers[0].stats()
            plan = replace(plan, batch=batch, budget=stats.budget_bytes)
            asks = None if request.log is None else read_request_log(request.log, servers[0].tokenize)
            if asks is not None:
                plan = replace(plan, requests=len(asks), clients=len(asks))
            comparison = SchedulerComparison(servers, texts, plan, layers=len(catalog.layers), asks=asks)
            _say(f"batch {batch}: texts that were seen before", servers[0].mode_line())
            comparison.prepare()
            for number in range(request.rounds):
                runs += comparison.run(
                    arms,
                    number,
                    lambda arm, b=batch, n=number: _say(f"batch {b}, round {n + 1}: {arm}"),  # type: ignore[misc]
                )
                shares = {"budget_bytes": stats.budget_bytes, "share": stats.budget_bytes / stats.total_bytes}
                turns = {"side_by_side": request.side_by_side}
                record = TrafficRecord(
                    trace="",
                    model=catalog.path.name,
                    fingerprint=catalog.fingerprint,
                    plan={**plan.common(), "budget": str(options.budget), **shares, **turns, "texts": source},
                    timing=None,
                    timing_source=f"by the clock in {adapter.engine}",
                    token_seconds=0.0,
                    runs=tuple(runs),
                )
                record.write(out / RECORD)
    assert record is not None
    show_traffic(record, out, as_json=request.as_json)


def _say(*words: str) -> None:
    print("; ".join(words), file=sys.stderr, flush=True)
