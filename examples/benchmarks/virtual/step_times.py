"""How even are steps? Hard mode, where no step waits for a load, beside the same model with everything resident.

    python examples/benchmarks/virtual/step_times.py MODEL.gguf --text prompts.json --budget 50% > step-times.json

Each text is decoded token by token by one arm after the other, so that both meet the same moods of the machine; the
model with everything resident, where nothing of Expertier happens, tells how even steps can be here.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("EXPERTIER_PROFILE", "off")

import numpy as np
from numpy.typing import NDArray

from expertier.comparison.hardware import describe_hardware
from expertier.comparison.prompts import read_texts
from expertier_llamacpp import Llama

ARMS: dict[str, dict[str, Any]] = {
    "all resident": {"expert_budget": "100%"},
    "hard": {"expert_virtual_hard": "on"},
}
_WARM_UP = 32  # steps of every arm


def summary(seconds: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Median and tail in milliseconds."""
    took = 1e3 * np.array(seconds)
    if not took.size:
        return {"steps": 0}
    median = float(np.median(took))
    quantiles = {f"p{100 * q:g}": float(np.quantile(took, q)) for q in (0.95, 0.99, 1.0)}
    return {"steps": len(took), "median_ms": median, **quantiles, "p99_over_median": quantiles["p99"] / median}


def main() -> None:
    """Measure and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="Held-out texts, as `expertier compare --text`.")
    parser.add_argument("--budget", default="50%", help="Of the hard arm.")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="Of each text.")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    arms = {
        name: Llama(
            str(options.model),
            n_ctx=512,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
            **{"expert_budget": options.budget, **settings},
        )
        for name, settings in ARMS.items()
    }
    by_domain: dict[str, list[str]] = {}
    for text in read_texts(options.text):
        by_domain.setdefault(text.domain, []).append(text.text)
    texts = [texts[-1 - place] for place in range(options.texts) for texts in by_domain.values() if place < len(texts)]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    by_text: list[dict[str, float]] = []
    swapping: list[bool] = []
    for text in texts[: options.texts]:
        ids = arms["hard"].tokenize(text.encode()[: 16 * options.tokens], add_bos=False)[: options.tokens]
        medians = {}
        for name, llama in arms.items():
            llama.reset()
            times = []
            for token in ids:
                if name == "hard":
                    swapping.append(llama.offload.swapping)
                started = time.perf_counter()
                llama.eval([token])
                times.append(time.perf_counter() - started)
            seconds[name] += times
            medians[name] = float(np.quantile(times, 0.99) / np.median(times))
        by_text.append(medians)
    stats = arms["hard"].offload.stats()
    steps = len(seconds["hard"])
    busy = np.array(swapping[_WARM_UP:])
    took = np.array(seconds["hard"][_WARM_UP:])
    record = {
        "hardware": asdict(describe_hardware(options.model)),
        "model": options.model.name,
        "budget": options.budget,
        "threads": options.threads,
        "arms": {name: summary(took[_WARM_UP:]) for name, took in seconds.items()},
        "p99_over_median_by_text": by_text,
        # Within one text the machine's mood changes least; the first one warms up.
        "p99_over_median, middle of texts": {
            name: float(np.median([text[name] for text in by_text[1:]])) for name in arms
        },
        "hard, begun during a swap": summary(took[busy]),
        "hard, begun without": summary(took[~busy]),
        "swaps_per_step": stats.swaps / steps,
        "misses": stats.decode.misses,
        "stall_seconds": stats.decode.stall_seconds,
    }
    for llama in arms.values():
        llama.close()
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
