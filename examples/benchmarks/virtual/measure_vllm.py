"""What virtual experts buy in vLLM: loads per token and throughput, against exact and against all resident.

    python examples/benchmarks/virtual/measure_vllm.py MODEL_DIRECTORY --text prompts.json --budget 50% --bias 0.2

All arms are loaded at the same time, each in processes of its own, and serve the same prompts in turns: a machine that
is busy with something else slows all of them alike. Prompts are held-out text, answers are sampled.
What substitution costs is measured token by token in llama.cpp (`expertier profile --quality`): the choice is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from expertier.comparison.hardware import describe_hardware
from expertier.comparison.prompts import read_texts


def load(model: Path, options: dict[str, Any]) -> Any:
    """Start an engine."""
    from vllm import LLM

    return LLM(
        model=str(model),
        max_model_len=256,
        max_num_batched_tokens=256,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="mp",
        additional_config={"expertier": {"profile": "off", **options}},
        seed=0,
    )


def counters(llm: Any) -> dict[str, Any]:
    """Return what the worker counts."""
    found: dict[str, Any] = llm.collective_rpc("expertier_stats")[0]
    return found


def serve(llm: Any, prompts: list[list[int]], tokens: int, together: bool) -> tuple[float, int]:
    """Serve prompts one after the other or all at once; return tokens per second and loads of decode steps."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.8, max_tokens=tokens, ignore_eos=True, detokenize=False)
    before = counters(llm)["decode"]
    began = time.perf_counter()
    for group in [prompts] if together else [[prompt] for prompt in prompts]:
        llm.generate([{"prompt_token_ids": prompt} for prompt in group], sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    after = counters(llm)["decode"]
    return len(prompts) * tokens / seconds, after["misses"] + after["late"] - before["misses"] - before["late"]


def main() -> None:
    """Measure and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--bias", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    arms = {
        "all resident": load(options.model, {"budget": "100%"}),
        "exact": load(options.model, {"budget": options.budget}),
        "virtual": load(options.model, {"budget": options.budget, "virtual_bias": options.bias}),
    }
    tokenizer = next(iter(arms.values())).get_tokenizer()
    texts = [text.text[:2000] for text in read_texts(options.text)][::-1]
    prompts = [tokenizer.encode(text, add_special_tokens=False)[:32] for text in texts[: 20 * options.rounds]]
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}
    for turn in range(options.rounds + 1):  # the first one warms up
        mine = prompts[20 * max(0, turn - 1) :][:20]
        for kind, group in (("1 request", mine[:4]), ("16 requests", mine[4:20])):
            for name, llm in arms.items():
                speed, loads = serve(llm, group, options.tokens, kind != "1 request")
                if turn:
                    row = rows.setdefault(kind, {}).setdefault(name, {"tokens_per_second": [], "loads_per_token": []})
                    row["tokens_per_second"].append(speed)
                    row["loads_per_token"].append(loads / (len(group) * (options.tokens - 1)))
    summary = {
        kind: {
            name: {
                "tokens_per_second": statistics.median(row["tokens_per_second"]),
                "loads_per_token": statistics.median(row["loads_per_token"]),
                "against_all_resident": statistics.median(
                    own / full
                    for own, full in zip(
                        row["tokens_per_second"], found["all resident"]["tokens_per_second"], strict=True
                    )
                ),
            }
            for name, row in found.items()
        }
        for kind, found in rows.items()
    }
    record = {
        "hardware": describe_hardware(options.model),
        "model": options.model.name,
        "budget": options.budget,
        "bias": options.bias,
        "virtual": counters(arms["virtual"])["virtual"],
        "summary": summary,
        "rounds": rows,
    }
    print(json.dumps(record, indent=1, default=vars), flush=True)
    for llm in arms.values():
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
