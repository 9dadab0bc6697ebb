"""What Expertier costs per layer with every expert resident: decode as it is, with a stop at every layer, without it.

    python examples/benchmarks/hook_cost.py model.gguf [--tokens 200] [--rounds 5] [--threads 2] [--predictor FOLDER]

The variants decode the same text in turns, so that a machine that is busy for a while slows all of them. Printed are
microseconds per MoE layer over stock: as it is (llama.cpp calls back about every node and nothing stops, because
nothing can be absent), with the stops of a model that does not fit, and with a trained predictor asked at every token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import llama_cpp

from expertier_llamacpp import Llama


def decode_seconds(llm: Any, tokens: list[int]) -> float:
    """Median seconds of a one-token step, teacher-forced."""
    llm.reset()
    llm.eval(tokens[:16])
    times = []
    for token in tokens[16:]:
        started = time.perf_counter()
        llm.eval([token])
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--predictor", help="what expertier train wrote")
    arguments = parser.parse_args()

    settings = dict(n_ctx=512, n_threads=arguments.threads, n_threads_batch=arguments.threads, verbose=False)
    stock = llama_cpp.Llama(arguments.model, **settings)
    ours = Llama(arguments.model, expert_budget="100%", expert_lookahead="off", **settings)
    predicting = None
    if arguments.predictor is not None:
        given = {"expert_predictor": arguments.predictor, "expert_lookahead": "on"}
        predicting = Llama(arguments.model, expert_budget="100%", **given, **settings)
        predicting.offload.hold_all = lambda *_: None
    text = (statistics.__doc__ or "") * 4  # real text that every Python has
    tokens = stock.tokenize(text.encode(), add_bos=False)[: arguments.tokens + 16]
    layers = len(ours.catalog.layers)

    hold_all = ours.offload.hold_all

    def with_stops(active: bool) -> float:
        ours.offload.hold_all = (lambda *_: None) if active else hold_all
        return decode_seconds(ours, tokens)

    variants: dict[str, Callable[[], float]] = {
        "stock": lambda: decode_seconds(stock, tokens),
        "resident": lambda: with_stops(False),
        "stops": lambda: with_stops(True),
    }
    if predicting is not None:
        variants["predicting"] = lambda: decode_seconds(predicting, tokens)
        decode_seconds(predicting, tokens)
    with_stops(True)  # brings every expert of this text in
    rounds = [{name: run() for name, run in variants.items()} for _ in range(arguments.rounds)]
    record: dict[str, Any] = {"layers": layers, "rounds": rounds}
    for name in list(variants)[1:]:
        extra = [(entry[name] - entry["stock"]) / layers * 1e6 for entry in rounds]
        record[f"{name}_us_per_layer"] = {
            "median": statistics.median(extra),
            "min": min(extra),
            "max": max(extra),
        }
    json.dump(record, sys.stdout, indent=1)
    print()
    ours.close()
    if predicting is not None:
        predicting.close()


if __name__ == "__main__":
    main()
