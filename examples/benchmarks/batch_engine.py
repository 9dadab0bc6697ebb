"""Many prompts together against one after the other, and against stock llama.cpp decoding the same batches.

    python examples/benchmarks/batch_engine.py model.gguf [--prompts prompts.json] [--budget 50%] [--rounds 5]

Without ``--prompts`` (a list of objects with "text" and "domain", as ``build.py`` writes beside a model) they are
pieces of Python's own documentation. Every arm completes the same prompts greedily to the same length; arms take turns.

* At the budget: all prompts together, and one after the other.
* With everything resident (``--resident``): the same two, and stock llama.cpp through its low-level API, whose loop has
  the same batches and samplers and no requests, texts or bookkeeping. Needs memory for two copies of the model.

One JSON record goes to standard output. With ``--clock cpu --threads 1`` the processor's time is measured, which says
nothing about waits for storage, and hardly depends on what else a machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import llama_cpp

from expertier_llamacpp import BatchEngine
from expertier_llamacpp.batch import Sampling
from expertier_llamacpp.batch.sampling import make_sampler
from expertier_llamacpp.batch.step import StepBatch

CELLS = 4096


class Stock:
    """Greedy completion of prompts of one length in stock llama.cpp."""

    def __init__(self, engine: BatchEngine, arguments: argparse.Namespace, never: dict[int, float]) -> None:
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = engine.llama._kernels.extra_buffer_types
        self._model = llama_cpp.llama_model_load_from_file(arguments.model.encode(), params)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CELLS, 512, 512
        settings.n_seq_max, settings.kv_unified = arguments.sequences, True
        settings.n_threads = settings.n_threads_batch = arguments.threads
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.ctx = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch = StepBatch(512)
        self._sampling = Sampling(temperature=0, logit_bias=never)
        self._llama = engine.llama

    def complete(self, prompts: Sequence[list[int]], length: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)
        chains = [make_sampler(self._llama, self._sampling) for _ in prompts]
        next_tokens = [list(prompt) for prompt in prompts]
        done = [0] * len(prompts)
        for _ in range(length):
            parts = [(row, done[row], tokens, True) for row, tokens in enumerate(next_tokens)]
            rows = self._batch.fill(parts)
            assert llama_cpp.llama_decode(self.ctx, self._batch.batch) == 0
            done = [before + len(tokens) for before, tokens in zip(done, next_tokens, strict=True)]
            next_tokens = [[chain.sample(self, row)] for chain, row in zip(chains, rows, strict=True)]

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self._model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--domain", help="prompts of this domain only; otherwise one of each in turn")
    parser.add_argument("--budget", default="50%", help="'none' leaves these arms out")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", help="only these, separated by commas, as they are called in the record")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that others use")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        name: value for name, value in vars(arguments).items() if name not in ("model", "prompts", "resident")
    }
    record["model"] = Path(arguments.model).name
    if arguments.budget != "none":
        record["at_budget"] = measure(arguments, arguments.budget, stock=False)
    if arguments.resident:
        record["resident"] = measure(arguments, "100%", stock=True)
    json.dump(record, sys.stdout, indent=1)
    print()


def measure(arguments: argparse.Namespace, budget: str, *, stock: bool) -> dict[str, Any]:
    """Run all arms in turns."""
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    engine = BatchEngine(
        arguments.model,
        max_sequences=arguments.sequences,
        expert_budget=budget,
        n_ctx=CELLS,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        verbose=False,
    )
    vocabulary = engine.llama._model.vocab
    never = {
        token: -1000.0 for token in range(engine.llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)
    }
    prompts = [engine.llama.tokenize(text.encode(), add_bos=False) for text in texts(arguments)]
    prompts = [tokens[: arguments.prompt_tokens] for tokens in prompts]
    in_decode = 0.0
    context: Any = engine.llama._ctx
    decode = context.decode

    def timed(batch: Any) -> None:
        nonlocal in_decode
        started = clock()
        decode(batch)
        in_decode += clock() - started

    context.decode = timed

    def ours(groups: Sequence[Sequence[list[int]]]) -> None:
        for group in groups:
            engine.forget()
            for output in engine.generate(group, max_tokens=arguments.output_tokens, temperature=0, logit_bias=never):
                assert len(output.tokens) == arguments.output_tokens, output.error

    arms: dict[str, Callable[[], None]] = {
        "together": lambda: ours([prompts]),
        "one after the other": lambda: ours([[prompt] for prompt in prompts]),
    }
    if stock:
        twin = Stock(engine, arguments, never)
        arms["stock together"] = lambda: twin.complete(prompts, arguments.output_tokens)
        arms["stock one after the other"] = lambda: (
            [twin.complete([p], arguments.output_tokens) for p in prompts] and None
        )
    if arguments.arms is not None:
        arms = {name: run for name, run in arms.items() if name in arguments.arms.split(",")}
    total = len(prompts) * arguments.output_tokens
    rounds = []
    for number in range(arguments.rounds + 1):
        entry: dict[str, Any] = {}
        for name, run in arms.items():
            before = engine.offload.stats()
            in_decode = 0.0
            started = clock()
            run()
            seconds = clock() - started
            after = engine.offload.stats()
            entry[name] = {"tokens_per_second": total / seconds}
            if not name.startswith("stock"):
                entry[name]["outside_decode_percent"] = 100 * (1 - in_decode / seconds)
                entry[name]["read_mb_per_token"] = (after.bytes_read - before.bytes_read) / total / 1e6
                if arguments.clock == "wall":
                    waits = [
                        getattr(after, p).stall_seconds - getattr(before, p).stall_seconds
                        for p in ("decode", "prefill")
                    ]
                    entry[name]["stall_percent"] = 100 * sum(waits) / seconds
        speeds = ", ".join(f"{name} {figures['tokens_per_second']:.1f}" for name, figures in entry.items())
        print(f"round {number}, tok/s: {speeds}", file=sys.stderr)
        if number:  # the first warms everything up
            rounds.append(entry)
    result: dict[str, Any] = {"mode": engine.llama.mode_line(), "rounds": rounds, "median": {}, "ratio": {}}
    for name in arms:
        result["median"][name] = {
            key: statistics.median(entry[name][key] for entry in rounds) for key in rounds[0][name]
        }
    pairs = [
        ("together", "one after the other"),
        ("together", "stock together"),
        ("one after the other", "stock one after the other"),
        ("stock together", "stock one after the other"),
    ]
    for left, right in pairs:
        if left not in arms or right not in arms:
            continue
        ratios = [entry[left]["tokens_per_second"] / entry[right]["tokens_per_second"] for entry in rounds]
        result["ratio"][f"{left} / {right}"] = {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        }
    if stock:
        twin.close()
    engine.close()
    return result


def texts(arguments: argparse.Namespace) -> list[str]:
    """As many different texts as there are sequences."""
    if arguments.prompts is None:
        own = [statistics, argparse, json, time, os]
        words = " ".join(
            " ".join(str(item.__doc__).split()) for module in own for item in (module, *vars(module).values())
        )
        return [words[start : start + 2000] for start in range(0, 2000 * arguments.sequences, 2000)]
    by_domain: dict[str, list[str]] = {}
    for item in json.loads(arguments.prompts.read_text()):
        by_domain.setdefault(item["domain"], []).append(item["text"])
    if arguments.domain is not None:
        return by_domain[arguments.domain][: arguments.sequences]
    rounds = [
        found[place]
        for place in range(max(map(len, by_domain.values())))
        for found in by_domain.values()
        if place < len(found)
    ]
    return rounds[: arguments.sequences]


if __name__ == "__main__":
    main()
