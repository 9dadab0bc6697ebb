"""What Expertier costs per expert layer of vLLM with every expert resident: as it is, and with a stop at every layer.

    python examples/benchmarks/vllm_hook_cost.py NARROW --out hook-cost.json

The layers of a loaded model are called in the worker, one token at a time and one layer after the other, in turns: the
kernel alone, as stock calls it; through Expertier while all experts are there, where nobody has to stop; and with the
stops of a model that does not fit (routes observed, working set asked for and released, next layer's gate consulted).
Take a model with narrow experts: their kernel is short, and what is measured is the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertier.comparison.hardware import cores, describe_hardware
from expertier_vllm.offline import open_engine, prepare_environment


def measure(worker: Any, rounds: int, steps: int) -> dict[str, list[float]]:
    """Microseconds per layer call; runs in the worker, where the layers are.

    Parameters
    ----------
    worker : ExpertierWorker
        As ``collective_rpc`` passes it.
    rounds, steps : int
        Each variant runs so many steps in each of so many rounds.

    Returns
    -------
    dict of str to list of float
        Variant to the median of every round.
    """
    import torch

    from expertier_vllm.step_kind import StepKind

    manager, forward = worker.expertier.manager, worker.expertier.forward
    stages = [module.managed for module in worker.get_model().modules() if hasattr(module, "managed")]
    stages.sort(key=lambda stage: stage.position)
    generator = torch.Generator().manual_seed(0)
    dtype, hidden = stages[0].module.params_dtype, stages[0].module.hidden_size
    inputs = []
    for stage in stages:
        logits = torch.rand(1, stage.experts, generator=generator)
        weights, ids = logits.softmax(-1).topk(stage.top_k)
        inputs.append((stage, torch.randn(1, hidden, generator=generator).to(dtype), weights, ids.to(torch.int32)))

    def kernel() -> None:
        for stage, x, weights, ids in inputs:
            stage.module.compute_resident(x, weights, ids)

    def through_us() -> None:
        for stage, x, weights, ids in inputs:
            forward.run(stage, x, weights, ids)

    hold_all, step_kind = manager.hold_all, forward.step_kind

    def with_stops() -> None:
        manager.hold_all = lambda *_: None
        try:
            through_us()
        finally:
            manager.hold_all = hold_all

    variants: dict[str, Callable[[], None]] = {"kernel": kernel, "resident": through_us, "stops": with_stops}
    found: dict[str, list[float]] = {name: [] for name in variants}
    forward.step_kind = lambda: StepKind(real=True, decode=True)
    try:
        with torch.inference_mode():
            for number in range(rounds + 1):
                for name, variant in variants.items():
                    times = []
                    for _ in range(steps):
                        started = time.perf_counter()
                        variant()
                        times.append(time.perf_counter() - started)
                    if number:  # the first round warms up
                        found[name].append(1e6 * statistics.median(times) / len(stages))
    finally:
        forward.step_kind = step_kind
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    prepare_environment(options.threads)
    llm = open_engine(
        options.checkpoint, {"budget": "100%"}, context=256, step_tokens=256, requests=1, cache_bytes=64 << 20
    )
    try:
        found = llm.collective_rpc(measure, args=(options.rounds, options.steps))[0]
    finally:
        llm.llm_engine.engine_core.shutdown()
    summary = {}
    for name in ("resident", "stops"):
        extra = [one - alone for one, alone in zip(found[name], found["kernel"], strict=True)]
        summary[name] = [round(value, 1) for value in (statistics.median(extra), min(extra), max(extra))]
    record = {
        "hardware": asdict(describe_hardware(options.checkpoint)),
        "microseconds_per_layer": found,
        "over the kernel: median, least, most": summary,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
