"""Does the simulator agree with the real adapter? Hits and bytes must be equal, time within 15 %.

    python examples/benchmarks/routing/check_simulator.py MODEL.gguf --text prompts.json --budget 25% --budget 50%

The model is loaded once per budget, and all of them read the same texts token by token, in turns: a machine that is
busy with something else slows all of them alike. Routes are recorded, replayed and compared. Nothing is loaded ahead
of need: when a prefetch arrives depends on the moment. The simulator is given the speeds of one more budget in the same
turns, and predicts the others.
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
from expertier.cli.profile import Measured, expert_share
from expertier.comparison.hardware import cores
from expertier.comparison.prompts import read_texts
from expertier.routing import Trace
from expertier.simulation import Events, Replay, Timing, load_events, replay
from expertier.simulation.timing import step_times
from expertier_llamacpp import Llama

CALIBRATION = "37.5%"


class Run:
    """The model under one budget."""

    def __init__(self, model: Path, budget: str, trace: Path) -> None:
        self.trace = trace
        self.measured = Measured()
        self.llama = Llama(
            str(model),
            n_ctx=512,
            n_threads=cores(),
            n_threads_batch=cores(),
            verbose=False,
            expert_budget=budget,
            expert_lookahead="off",
            expert_trace=str(trace),
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

    def finish(self) -> tuple[dict[str, Any], Events, Replay, float]:
        """Return the manager's counters, the trace, its replay and the seconds of a step."""
        stats = self.llama.offload.stats().as_dict()
        self.llama.close()
        events = load_events(Trace(self.trace))
        seconds = sum(self.measured.seconds) / len(self.measured.seconds)
        return stats, events, replay(events, "lfu", stats["budget_bytes"]), seconds


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


def compare(model: Path, texts: list[str], budgets: list[str], tokens: int, directory: Path) -> list[dict[str, Any]]:
    """Run all budgets in turns and simulate them."""
    runs = {budget: Run(model, budget, directory / budget) for budget in (CALIBRATION, *budgets)}
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
    _, events, found, seconds = calibration.finish()
    timing = fit(events, found, calibration.measured, share, seconds)
    rows = []
    for budget, run in runs.items():
        stats, events, found, seconds = run.finish()
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
    options = parser.parse_args()
    texts = [text.text[:4096] for text in read_texts(options.text)][::7]
    rows = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as directory:
            rows += compare(options.model, texts, options.budget, options.tokens, Path(directory))
    summary = {
        budget: {
            "equal": all(
                row[key][0] == row[key][1]
                for row in rows
                for key in ("hits", "misses", "bytes")
                if row["budget"] == budget
            ),
            "time_ratio": statistics.median(row["ratio"] for row in rows if row["budget"] == budget),
        }
        for budget in options.budget
    }
    print(json.dumps({"runs": rows, "summary": summary}, indent=1))


if __name__ == "__main__":
    main()
