"""Does the simulator agree with the real adapter? Hits and bytes must be equal, time within 15 %.

    python examples/benchmarks/routing/check_simulator.py MODEL.gguf --text prompts.json --budget 25% --budget 50%

Reads the texts token by token with llama.cpp under each budget while routes are recorded, replays what was recorded,
and compares. Both are told not to load ahead: when a prefetch arrives depends on the moment. Compute is measured first,
with everything resident; the storage is measured before and after every run, because that of a shared machine changes.
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

from expertier.cli.profile import Measured, expert_share
from expertier.comparison.hardware import cores
from expertier.comparison.prompts import read_texts
from expertier.planning.calibrate import measure_disk
from expertier.routing import Trace
from expertier.simulation import Timing, load_events, replay
from expertier.simulation.timing import step_times
from expertier_llamacpp import Llama


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


def main() -> None:
    """Compare and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    texts = [text.text[:4096] for text in read_texts(options.text)][::7]
    results = []
    with tempfile.TemporaryDirectory() as directory:
        _, resident = run(options.model, texts, "100%", options.tokens, Path(directory) / "resident")
        settled = len(resident.seconds) // 2
        own = [a - b for a, b in zip(resident.seconds, resident.stall, strict=True)][settled:]
        compute = statistics.median(own)
        for repeat in range(options.repeats):
            for budget in options.budget:
                path = Path(directory) / f"{budget}-{repeat}"
                disks = [_disk(options.model)]
                stats, measured = run(options.model, texts, budget, options.tokens, path)
                disks.append(_disk(options.model))
                trace = Trace(path)
                events = load_events(trace)
                found = replay(events, "lfu", stats["budget_bytes"])
                timing = Timing(
                    bandwidth=sum(disks) / 2,
                    compute=compute,
                    latency=1e-4,
                    load_cost=measured.costs()["load_cost_seconds"],
                    expert_share=expert_share_of(options.model),
                )
                simulated = step_times(events, found, timing).demand
                real = sum(measured.seconds) / len(measured.seconds)
                results.append(
                    {
                        "budget": budget,
                        "hits": [stats["decode"]["ready_hits"] + stats["decode"]["late"], found.hits],
                        "misses": [stats["decode"]["misses"], found.requests - found.hits],
                        "bytes": [stats["bytes_read"], int(found.bytes_read.sum())],
                        "ms_per_token": [1e3 * real, 1e3 * simulated],
                        "ratio": simulated / real,
                        "storage": disks,
                        "stall_ms": 1e3 * sum(measured.stall) / len(measured.stall),
                        "timing": asdict(timing),
                    }
                )
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))
    assert all(row["misses"][0] == row["misses"][1] and row["bytes"][0] == row["bytes"][1] for row in results)


def expert_share_of(model: Path) -> float:
    """Part of a token's weights that are experts."""
    from expertier.catalog import read_catalog

    return expert_share(read_catalog(model))


def _disk(model: Path) -> float:
    from expertier.catalog import read_catalog

    catalog = read_catalog(model)
    return measure_disk(catalog.files, read_bytes=catalog.largest_expert_bytes, most_seconds=1.0).random


if __name__ == "__main__":
    main()
