"""Does the simulator agree with the real adapter? Hits and bytes must be equal, time within 15 %.

    python examples/benchmarks/routing/check_simulator.py MODEL.gguf --text prompts.json --budget 25% --budget 50%

Reads the texts token by token with llama.cpp under each budget while routes are recorded, replays what was recorded,
and compares. Both are told not to load ahead: when a prefetch arrives depends on the moment. The speeds the simulator
is given come from a run at yet another budget right before, because those of a shared machine change.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
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
from expertier.simulation import Timing, load_events, replay
from expertier.simulation.timing import step_times
from expertier_llamacpp import Llama

CALIBRATION = "37.5%"


def run(model: Path, texts: list[str], budget: str, tokens: int, trace: Path) -> tuple[dict[str, Any], Measured]:
    """Decode under a budget; return the manager's counters and what every step took."""
    llama = Llama(
        str(model),
        n_ctx=512,
        n_threads=cores(),
        n_threads_batch=cores(),
        verbose=False,
        expert_budget=budget,
        expert_lookahead="off",
        expert_trace=str(trace),
    )
    measured = Measured()
    try:
        if budget != "100%":
            llama.offload.config = replace(
                llama.offload.config, fill=False
            )  # loads into free room depend on the moment
        read = 0
        for text in texts:
            ids = llama.tokenize(text.encode(), add_bos=False)[:256]
            llama.reset()
            for token in ids[: tokens - read]:
                before = llama.offload.stats().decode
                started = time.perf_counter()
                llama.eval([token])
                measured.seconds.append(time.perf_counter() - started)
                after = llama.offload.stats().decode
                measured.stall.append(after.stall_seconds - before.stall_seconds)
                measured.loads.append(after.misses - before.misses)
            read += len(ids)
            if read >= tokens:
                break
        return llama.offload.stats().as_dict(), measured
    finally:
        llama.close()


def calibrate(model: Path, texts: list[str], tokens: int, trace: Path) -> Timing:
    """Fit speeds to a run at another budget: the engine's own reads, on the machine as it is now."""
    stats, measured = run(model, texts, CALIBRATION, tokens, trace)
    events = load_events(Trace(trace))
    found = replay(events, "lfu", stats["budget_bytes"])
    costs = measured.costs()
    timing = Timing(
        bandwidth=1.0,
        compute=costs["compute_seconds_per_step"],
        latency=1e-4,
        load_cost=costs["load_cost_seconds"],
        expert_share=expert_share(read_catalog(model)),
    )
    target = sum(measured.seconds) / len(measured.seconds)
    slow, quick = 1e6, 1e12
    while quick / slow > 1.0001:
        middle = (slow * quick) ** 0.5
        if step_times(events, found, replace(timing, bandwidth=middle)).demand > target:
            slow = middle
        else:
            quick = middle
    return replace(timing, bandwidth=slow)


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
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(options.repeats):
            timing = calibrate(options.model, texts, options.tokens, Path(directory) / f"calibration-{repeat}")
            for budget in options.budget:
                path = Path(directory) / f"{budget}-{repeat}"
                stats, measured = run(options.model, texts, budget, options.tokens, path)
                events = load_events(Trace(path))
                found = replay(events, "lfu", stats["budget_bytes"])
                real = sum(measured.seconds) / len(measured.seconds)
                simulated = step_times(events, found, timing).demand
                row = {
                    "budget": budget,
                    "hits": [stats["decode"]["ready_hits"] + stats["decode"]["late"], found.hits],
                    "misses": [stats["decode"]["misses"], found.requests - found.hits],
                    "bytes": [stats["bytes_read"], int(found.bytes_read.sum())],
                    "ms_per_token": [1e3 * real, 1e3 * simulated],
                    "ratio": simulated / real,
                    "timing": asdict(timing),
                }
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    summary = {
        budget: {
            "equal": all(row[key][0] == row[key][1] for row in rows for key in ("hits", "misses", "bytes")),
            "time_ratio": statistics.median(row["ratio"] for row in rows if row["budget"] == budget),
        }
        for budget in options.budget
    }
    print(json.dumps({"runs": rows, "summary": summary}, indent=1))


if __name__ == "__main__":
    main()
