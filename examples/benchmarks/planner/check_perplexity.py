"""Does the planner foresee what stand-ins cost? Perplexity within half a point of what it says, at any memory budget.

    expertier profile MODEL.gguf --quality --text calibration.json --at 25% --at 50%
    python examples/benchmarks/planner/check_perplexity.py MODEL.gguf --text prompts.json --quality-budget 1%

For each memory budget the plan's bias is put into force and held-out texts are decoded token by token; the exact
model's logits at the same positions are the measure. The controller is not at work: a plan is about the bias itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("EXPERTIER_PROFILE", "off")

from expertier.catalog import read_catalog
from expertier.comparison.prompts import read_texts
from expertier.config import OffloadOptions
from expertier.quality import Reference, evaluate, samples
from expertier.quality.planning import plan_quality
from expertier_llamacpp import Llama
from expertier_llamacpp.adapter import LlamaCppSession


def main() -> None:
    """Measure and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--at", action="append", help="Memory budget in per cent; repeat it for several.")
    parser.add_argument("--quality-budget", default="1%")
    parser.add_argument("--sidecar-dir", help="Where the quality profile lies, if not beside the model.")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="Of each text.")
    options = parser.parse_args()
    own = replace(OffloadOptions(), quality_budget=options.quality_budget, sidecar_dir=options.sidecar_dir)
    quality = plan_quality(own, read_catalog(options.model))
    if quality is None:
        raise SystemExit(f"{options.quality_budget} is not a percentage of perplexity.")

    def session(budget: str, bias: float | None) -> LlamaCppSession:
        return LlamaCppSession(
            Llama(
                str(options.model),
                n_ctx=options.tokens,
                n_threads=1,
                n_threads_batch=1,
                verbose=False,
                expert_budget=budget,
                expert_virtual_bias=bias,
                expert_lookahead="off",
                expert_predictor="off",
            )
        )

    exact = session("100%", None)
    last_first = list(reversed(read_texts(options.text)))  # profiles read a file from its beginning
    *texts, warm_up = samples(exact, last_first, count=options.texts + 1, tokens=options.tokens)
    rows = []
    with Reference(exact, texts) as reference:
        exact.close()
        for at in options.at or ["25%", "30%", "40%", "50%", "65%", "80%"]:
            [planned] = quality.settings(float(at[:-1]) / 100)
            serving = session(at, planned.bias)
            found = evaluate(serving, reference, warm_up=warm_up.tokens)
            serving.close()
            interval = found.perplexity_increase()
            rows.append(
                {
                    "memory": at,
                    "bias": planned.bias,
                    "planned_increase": planned.perplexity_rise,
                    "measured_increase": [interval.low, interval.middle, interval.high],
                    "points_between": 100 * (interval.middle - planned.perplexity_rise),
                    "tokens": found.tokens,
                    "loads_per_token": found.loads_per_token,
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    record = {"model": options.model.name, "quality_budget": options.quality_budget, "rows": rows}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
