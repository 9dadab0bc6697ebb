"""Does the planner foresee what the real adapter does? Tokens per second within 15 %, memory never over.

    expertier profile MODEL.gguf --text prompts.json --tokens 4000 --tokens-per-text 64 --out routes.trace
    python examples/benchmarks/planner/check_planner.py MODEL.gguf --text prompts.json --routes routes.trace

The model is loaded once per budget, and all of them read the same texts token by token, in turns: a machine that is
busy with something else slows all of them alike. Four more budgets in the same turns give the engine's speeds, as
`expertier plan --calibrate` measures them; hit ratios come from the recorded routes, which are of other texts of the
same kinds and length: the profile reads the file from its beginning, this from its end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from expertier.catalog import read_catalog
from expertier.cli.calibration import SHARES, step_loads
from expertier.cli.plan import load_routes
from expertier.comparison.hardware import describe_hardware
from expertier.comparison.prompts import read_texts
from expertier.planning.planner import trade_off
from expertier.planning.speed import SpeedSample, fit_speed, usual_steps
from expertier.routing import read_trace
from expertier.simulation import Events, load_events
from expertier_llamacpp import Llama

WARM_UP = 48


class Run:
    """The model under one budget."""

    def __init__(self, model: Path, budget: str, threads: int, **options: Any) -> None:
        self.llama = Llama(
            str(model),
            n_ctx=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            expert_budget=budget,
            expert_profile="off",
            **options,
        )
        self.seconds: list[float] = []
        self.budget = self.llama.offload.budget

    def step(self, token: int) -> None:
        """Decode one token."""
        started = time.perf_counter()
        self.llama.eval([token])
        self.seconds.append(time.perf_counter() - started)

    def sample(self, events: Events) -> SpeedSample:
        """Seconds and loads of the steps after the first ones, which warm up."""
        loads = step_loads(events, "lfu", self.budget)[WARM_UP:]
        return SpeedSample(budget_bytes=self.budget, seconds=tuple(self.seconds[WARM_UP:]), loads=loads)


def main() -> None:
    """Measure, plan, compare, and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--routes", type=Path, required=True)
    parser.add_argument("--budget", action="append")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--per-text", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    budgets = options.budget or ["12.5%", "20%", "35%", "50%", "70%", "85%"]
    catalog = read_catalog(options.model)
    profile = load_routes(options.routes, catalog)
    by_domain: dict[str, list[str]] = {}
    for text in read_texts(options.text):
        by_domain.setdefault(text.domain, []).append(text.text[:4096])
    texts = [texts[-1 - place] for place in range(2) for texts in by_domain.values()]
    calibration = [f"{100 * share:g}%" for share in SHARES]
    with tempfile.TemporaryDirectory() as folder:
        recorder = Run(options.model, "100%", options.threads, expert_trace=str(Path(folder, "routes")))
        runs = {budget: Run(options.model, budget, options.threads) for budget in (*calibration, *budgets)}
        left = options.tokens
        for text in texts:
            ids = recorder.llama.tokenize(text.encode(), add_bos=False)[: min(options.per_text, left)]
            for run in (recorder, *runs.values()):
                run.llama.reset()
            for token in ids:
                for run in (recorder, *runs.values()):
                    run.step(token)
            left -= len(ids)
            if not left:
                break
        recorder.llama.close()
        events = load_events(read_trace(Path(folder, "routes")))
    samples = [runs[budget].sample(events) for budget in calibration]
    speed = fit_speed(
        samples,
        total_bytes=profile.total_bytes,
        engine="llamacpp",
        fingerprint=catalog.fingerprint,
        threads=options.threads,
    )
    rows = []
    for budget in budgets:
        run = runs[budget]
        started = time.perf_counter()
        plan = trade_off(profile, run.budget, smallest=profile.smallest_bytes, largest=1 << 60, speed=speed).chosen
        planning = time.perf_counter() - started
        stats = run.llama.offload.stats()
        sample = run.sample(events)
        measured = 1 / float(np.array(sample.seconds)[usual_steps(sample)].mean())
        assert plan.tokens_per_second is not None
        rows.append(
            {
                "budget": budget,
                "budget_bytes": run.budget,
                "peak_resident_bytes": stats.peak_resident_bytes,
                "never_over": stats.peak_resident_bytes <= run.budget,
                "tokens_per_second": {"planned": plan.tokens_per_second, "measured": measured},
                "ratio": plan.tokens_per_second / measured,
                "ratio_with_the_loads_of_these_texts": 1
                / (speed.token_seconds(float(np.mean(sample.loads))) * measured),
                "loads_per_token": {
                    "planned": plan.loads_per_token,
                    "of_these_texts": float(np.mean(sample.loads)),
                },
                "planning_seconds": planning,
            }
        )
    for run in runs.values():
        run.llama.close()
    record = {
        "hardware": describe_hardware(options.model),
        "model": options.model.name,
        "tokens": options.tokens,
        "threads": options.threads,
        "speed": {
            "resident_ms": 1e3 * speed.resident_seconds,
            "managed_ms": 1e3 * speed.managed_seconds,
            "load_ms": 1e3 * speed.load_seconds,
            "measured": speed.measured,
        },
        "rows": rows,
    }
    print(json.dumps(record, indent=1, default=vars))


if __name__ == "__main__":
    main()
