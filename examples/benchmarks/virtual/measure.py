"""What stand-ins save and cost: loads per token, perplexity and step times against the exact model, by bias.

    python examples/benchmarks/virtual/measure.py MODEL.gguf --text prompts.json --budget 25% --budget 50% > record.json

Held-out texts are decoded token by token in llama.cpp under the real residency (a wide batch would hide what is lost),
and every position is compared with the exact model's. Loads are experts read from storage, those that nobody waited for
included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("EXPERTIER_PROFILE", "off")

import numpy as np

from expertier.comparison.prompts import read_texts
from expertier.quality.evaluation import Evaluation, Reference, evaluate, samples
from expertier_llamacpp import Llama
from expertier_llamacpp.adapter import LlamaCppSession

HARD = float("inf")


class Timed(LlamaCppSession):
    """A session that notes how long each step takes."""

    def __init__(self, llama: Llama) -> None:
        super().__init__(llama)
        self.seconds: list[float] = []

    def read(self, tokens: Sequence[int], *, fresh: bool) -> None:
        started = time.perf_counter()
        super().read(tokens, fresh=fresh)
        self.seconds.append(time.perf_counter() - started)


def open_model(model: Path, budget: str, **options: Any) -> Timed:
    """Load the model with nothing predicted: loads are those that routing and stand-ins cause."""
    return Timed(
        Llama(
            str(model),
            n_ctx=512,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
            expert_budget=budget,
            expert_lookahead="off",
            expert_predictor="off",
            **options,
        )
    )


def row(session: Timed, found: Evaluation, budget: str, bias: float, protect: int) -> dict[str, Any]:
    """Everything about one arm."""
    increase = found.perplexity_increase()
    stats = session.stats()
    seconds = np.array(session.seconds)
    return {
        "budget": budget,
        "bias": "hard" if bias == HARD else bias,
        "protect": protect,
        "tokens": found.tokens,
        "loads_per_token": found.bytes_per_token / (stats.total_bytes / stats.total_experts),
        "demand_loads_per_token": found.loads_per_token,
        "cross_entropy": found.cross_entropy,
        "perplexity_increase": [increase.low, increase.middle, increase.high],
        "kl": found.kl,
        "agreement": found.agreement,
        "substituted_mass": found.substituted.tolist(),
        "step_ms": {"median": 1e3 * float(np.median(seconds)), "p99": 1e3 * float(np.quantile(seconds, 0.99))},
    }


def main() -> None:
    """Measure every arm and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="Held-out texts, as `expertier compare --text`.")
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--arm", action="append", help="BIAS, BIAS/PROTECT or 'hard'.")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=160, help="Of each text.")
    options = parser.parse_args()
    arms = [
        (HARD, 0) if arm == "hard" else (float(arm.partition("/")[0]), int(arm.partition("/")[2] or 0))
        for arm in options.arm or ["0", "0.05", "0.1", "0.15", "0.2", "0.3", "0.3/1", "hard"]
    ]
    exact = open_model(options.model, "100%")
    texts = samples(exact, read_texts(options.text), count=options.texts + 1, tokens=options.tokens)
    *measured, warm_up = texts
    rows = []
    with Reference(exact, measured) as reference:
        exact.close()
        for budget in options.budget:
            soft = open_model(options.model, budget, expert_virtual_bias=0)
            for bias, protect in arms:
                session = open_model(options.model, budget, expert_virtual_hard="on") if bias == HARD else soft
                if bias != HARD:
                    session.set_virtual(bias, protect)
                for _ in session.follow(warm_up.tokens, prompt=1):
                    pass
                session.seconds.clear()
                rows.append(row(session, evaluate(session, reference), budget, bias, protect))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if session is not soft:
                    session.close()
            soft.close()
    record = {"model": options.model.name, "texts": len(measured), "rows": rows}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
