"""Does the simulator agree with the real adapter? Hits and bytes must be equal, time within 15 %.

    python examples/benchmarks/routing/check_simulator.py MODEL.gguf --text prompts.json --budget 25% --budget 50%

The model is loaded once per budget, and all of them read the same texts token by token, in turns: a machine that is
busy with something else slows all of them alike. Routes are recorded, replayed and compared. Nothing is loaded ahead
of need: when a prefetch arrives depends on the moment. The simulator is given the speeds of one more budget in the same
turns, and predicts the others.

With ``--predictor FOLDER`` those others run with prediction, whole paths and lookahead. Then bytes depend on the
moment, too, and are compared like times. What prediction takes of the engine is taken from one more run, with
prediction at the budget the speeds are from.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from expertier.catalog import read_catalog
from expertier.catalog.routers import read_norms, read_routers
from expertier.cli.profile import Measured, expert_share
from expertier.comparison.hardware import cores
from expertier.comparison.prompts import read_texts
from expertier.routing import GainGate, Lookahead, Trace
from expertier.routing.predictor import RoutedModel
from expertier.routing.saved import load_predictor
from expertier.simulation import Events, Replay, Timing, load_events, replay
from expertier.simulation.loads import AdapterLoads
from expertier.simulation.prefetch import SimulatedManager, TimedReplay, replay_timed
from expertier.simulation.timing import step_times
from expertier_llamacpp import Llama

CALIBRATION = "37.5%"
PREDICTING = "37.5% with prediction"
_COLD = 4  # first steps that are not timed: libraries come from a cold cache, the first model's wait for all


class Run:
    """The model under one budget, with a predictor or without any prediction."""

    def __init__(self, model: Path, budget: str, trace: Path, predictor: Path | None = None) -> None:
        self.trace = trace
        self.measured = Measured()
        self.llama = Llama(
            str(model),
            n_ctx=512,
            n_threads=cores(),
            n_threads_batch=cores(),
            verbose=False,
            expert_budget=budget,
            expert_lookahead="off" if predictor is None else "on",
            expert_predictor="off" if predictor is None else str(predictor),
            expert_profile="off",
            expert_trace=str(trace),
            expert_trace_tokens="off" if predictor is None else "on",
            expert_trace_hidden=None if predictor is None else 1,
        )
        # What is loaded into free room in the background depends on the moment, too.
        self.llama.offload.config = replace(self.llama.offload.config, fill=False)

    def step(self, token: int) -> None:
        """Decode one token."""
        before = self.llama.offload.stats().decode
        started = time.perf_counter()
        self.llama.eval([token])
        self.measured.seconds.append(time.perf_counter() - started)
        after = self.llama.offload.stats().decode
        self.measured.stall.append(after.stall_seconds - before.stall_seconds)
        self.measured.loads.append(after.misses - before.misses)

    def finish(self) -> tuple[dict[str, Any], Events, float]:
        """Return the manager's counters, the trace and the seconds of a step."""
        stats = self.llama.offload.stats().as_dict()
        self.llama.close()
        seconds = statistics.fmean(self.measured.seconds[_COLD:])
        return stats, load_events(Trace(self.trace)), seconds


def fit(events: Events, found: Replay, measured: Measured, share: float, target: float) -> Timing:
    """Find the speeds with which the simulator takes as long as a run did."""
    costs = measured.costs()
    timing = Timing(
        bandwidth=1.0,
        compute=costs["compute_seconds_per_step"],
        latency=1e-4,
        load_cost=costs["load_cost_seconds"],
        expert_share=share,
    )
    slow, quick = 1e6, 1e12
    while quick / slow > 1.0001:
        middle = (slow * quick) ** 0.5
        if step_times(events, found, replace(timing, bandwidth=middle)).demand > target:
            slow = middle
        else:
            quick = middle
    return replace(timing, bandwidth=slow)


def predicted(events: Events, budget: int, timing: Timing, model: Path, predictor: Path) -> TimedReplay:
    """Simulate what the engine does with prediction."""

    def loads(manager: SimulatedManager) -> AdapterLoads:
        catalog = read_catalog(model)
        return AdapterLoads(
            events,
            manager,
            predictor=load_predictor(predictor, RoutedModel.of_trace(events.header)),
            lookahead=Lookahead(
                gates=read_routers(catalog),
                norms=read_norms(catalog),
                top_k={layer.layer: layer.top_k for layer in events.header.layers},
            ),
            gate=GainGate("on"),
            clock=lambda: manager.disk.now,
        )

    return replay_timed(events, "predictive", budget, timing, loads=loads)


def fit_prediction(events: Events, budget: int, timing: Timing, model: Path, predictor: Path, target: float) -> Timing:
    """Find what prediction takes of the engine, with which the simulator takes as long as a run with prediction did."""
    least, most = 0.0, target
    while most - least > 1e-5:
        middle = (least + most) / 2
        timed = predicted(events, budget, replace(timing, prediction=middle), model, predictor)
        if timed.seconds / timed.steps < target:
            least = middle
        else:
            most = middle
    return replace(timing, prediction=least)


def compare(
    model: Path, texts: list[str], budgets: list[str], tokens: int, directory: Path, predictor: Path | None
) -> list[dict[str, Any]]:
    """Run all budgets in turns and simulate them."""
    runs = {budget: Run(model, budget, directory / budget, predictor) for budget in budgets}
    runs[CALIBRATION] = Run(model, CALIBRATION, directory / CALIBRATION)
    if predictor is not None:
        runs[PREDICTING] = Run(model, CALIBRATION, directory / PREDICTING, predictor)
    left = tokens
    for text in texts:
        ids = runs[CALIBRATION].llama.tokenize(text.encode(), add_bos=False)[: min(256, left)]
        for run in runs.values():
            run.llama.reset()
        for token in ids:
            for run in runs.values():
                run.step(token)
        left -= len(ids)
        if not left:
            break
    share = expert_share(read_catalog(model))
    calibration = runs.pop(CALIBRATION)
    stats, events, seconds = calibration.finish()
    found = replay(events, "lfu", stats["budget_bytes"])
    timing = fit(events, found, calibration.measured, share, seconds)
    if predictor is not None:
        stats, events, seconds = runs.pop(PREDICTING).finish()
        timing = fit_prediction(events, stats["budget_bytes"], timing, model, predictor, seconds)
    rows = []
    for budget, run in runs.items():
        stats, events, seconds = run.finish()
        if predictor is not None:
            timed = predicted(events, stats["budget_bytes"], timing, model, predictor)
            simulated = timed.seconds / timed.steps
            rows.append(
                {
                    "budget": budget,
                    "bytes": [stats["bytes_read"], timed.bytes_read],
                    "ms_per_token": [1e3 * seconds, 1e3 * simulated],
                    "ratio": simulated / seconds,
                    "timing": asdict(timing),
                }
            )
            continue
        found = replay(events, "lfu", stats["budget_bytes"])
        simulated = step_times(events, found, timing).demand
        rows.append(
            {
                "budget": budget,
                "hits": [stats["decode"]["ready_hits"] + stats["decode"]["late"], found.hits],
                "misses": [stats["decode"]["misses"], found.requests - found.hits],
                "bytes": [stats["bytes_read"], int(found.bytes_read.sum())],
                "ms_per_token": [1e3 * seconds, 1e3 * simulated],
                "ratio": simulated / seconds,
                "timing": asdict(timing),
            }
        )
    return rows


def main() -> None:
    """Compare and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--predictor", type=Path, help="run the budgets with prediction by what `train` has written")
    options = parser.parse_args()
    texts = [text.text[:4096] for text in read_texts(options.text)][::7]
    rows = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as directory:
            rows += compare(options.model, texts, options.budget, options.tokens, Path(directory), options.predictor)
    summary = {
        budget: {
            "equal": all(
                row[key][0] == row[key][1]
                for row in rows
                for key in ("hits", "misses", "bytes")
                if row["budget"] == budget
            )
            if options.predictor is None
            else None,
            "bytes_ratio": statistics.median(
                row["bytes"][1] / row["bytes"][0] for row in rows if row["budget"] == budget
            ),
            "time_ratio": statistics.median(row["ratio"] for row in rows if row["budget"] == budget),
        }
        for budget in options.budget
    }
    print(json.dumps({"runs": rows, "summary": summary}, indent=1))


if __name__ == "__main__":
    main()
