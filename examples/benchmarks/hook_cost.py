"""What Expertier costs per layer when every expert is resident: decode with it, with a hook that only says no, without.

    python examples/benchmarks/hook_cost.py model.gguf [--tokens 200] [--rounds 5] [--threads 2]

The three variants decode the same text in turns, so that a machine that is busy for a while slows all of them. Printed
are microseconds per MoE layer over stock: the asking (llama.cpp calls back about every node) and the whole.
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
    arguments = parser.parse_args()

    settings = dict(n_ctx=512, n_threads=arguments.threads, n_threads_batch=arguments.threads, verbose=False)
    stock = llama_cpp.Llama(arguments.model, **settings)
    ours = Llama(arguments.model, expert_budget="100%", expert_lookahead="off", **settings)
    text = (statistics.__doc__ or "") * 4  # real text that every Python has
    tokens = stock.tokenize(text.encode(), add_bos=False)[: arguments.tokens + 16]
    layers = len(ours.catalog.layers)

    hook = ours._hook
    watched = hook._mul_mat_id, hook._other_topk_ops

    def with_hook(active: bool) -> float:
        hook._mul_mat_id, hook._other_topk_ops = watched if active else (-1, frozenset())
        return decode_seconds(ours, tokens)

    variants: dict[str, Callable[[], float]] = {
        "stock": lambda: decode_seconds(stock, tokens),
        "asking": lambda: with_hook(False),
        "whole": lambda: with_hook(True),
    }
    with_hook(True)  # brings every expert of this text in
    rounds = [{name: run() for name, run in variants.items()} for _ in range(arguments.rounds)]
    record: dict[str, Any] = {"layers": layers, "rounds": rounds}
    for name in ("asking", "whole"):
        extra = [(entry[name] - entry["stock"]) / layers * 1e6 for entry in rounds]
        record[f"{name}_us_per_layer"] = {
            "median": statistics.median(extra),
            "min": min(extra),
            "max": max(extra),
        }
    json.dump(record, sys.stdout, indent=1)
    print()
    ours.close()


if __name__ == "__main__":
    main()
