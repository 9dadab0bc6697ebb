"""vLLM with and without Expertier in turns, warm: speed, distance from what compute and storage allow, and memory.

    python examples/benchmarks/vllm_bounds.py CHECKPOINT --text prompts.json --twin NARROW --out bounds.json

Stock and Expertier at 100, 50 and 25 % of the experts, each an engine with a worker process of its own, all alive at
the same time and asked one after the other, round by round: a machine that is busy for a while slows all of them. Every
round asks each for 1, 8 and 32 requests at a time and measures the storage under the sidecar. A decode step is compared
with the larger of stock's step and the time that the bytes it read take at that speed; a prompt with stock's and with
the time of reading all experts once.

`NARROW` is the same model with experts of a few KiB: what stock needs for it is what stock needs without experts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from expertier.catalog import read_catalog
from expertier.comparison.hardware import cores, describe_hardware
from expertier.comparison.prompts import load_texts
from expertier.planning.calibrate import measure_disk
from expertier_vllm.offline import Steps, greedy, open_engine, prepare_environment

PROMPT = 64
LONG = 2000
LONG_PROMPT = f"prompt of {LONG} tokens"
CACHE_BYTES = 288 << 20
_QUIET = 1.2  # seconds after which a worker that is asked nothing no longer polls


class Engine:
    """One arm: an engine in this process, its worker in another."""

    def __init__(self, name: str, checkpoint: Path, options: dict[str, Any] | None) -> None:
        self.name = name
        self.ours = options is not None
        before = _children()
        self.llm = open_engine(
            checkpoint, options, context=LONG + 48, step_tokens=LONG + 48, requests=32, cache_bytes=CACHE_BYTES
        )
        self.processes = _children() - before

    def counters(self) -> dict[str, Any]:
        """Expertier's counters; nothing for stock."""
        stats: dict[str, Any] = self.llm.collective_rpc("expertier_stats")[0] if self.ours else {}
        return stats

    def peak_bytes(self) -> int:
        """Most resident memory of the worker since it started."""
        peaks = [0]
        for process in self.processes:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
                peaks += [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
        return max(peaks)

    def serve(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Answer requests made at the same moment; decode steps and what they read are told apart from prompts."""
        steps = Steps(self.llm, prompts, greedy(tokens))
        read = misses = first = last = 0.0
        decode: list[float] = []
        for _ in steps:
            now = steps.seconds
            if not first and all(answer.tokens for answer in steps.answers):
                stats = self.counters()
                read, misses = stats.get("bytes_read", 0), stats.get("decode", {}).get("misses", 0)
                first = now
            elif first:
                decode.append(now - last)
            last = now
        stats = self.counters()
        return {
            "tokens": [answer.tokens for answer in steps.answers],
            "seconds": steps.seconds,
            "first_token_seconds": first,
            "step_seconds": statistics.fmean(decode) if decode else None,
            "steps": len(decode),
            "step_bytes": (stats.get("bytes_read", 0) - read) / len(decode) if decode else None,
            "step_misses": (stats.get("decode", {}).get("misses", 0) - misses) / len(decode) if decode else None,
        }


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def one_round(engines: list[Engine], texts: list[list[int]], number: int, options: argparse.Namespace) -> Any:
    """Ask every engine the same; returns figures by number of requests and arm."""
    found: dict[str, dict[str, Any]] = {}
    first = number % len(engines)
    in_turn = engines[first:] + engines[:first]
    for count in options.requests:
        places = [(texts[(index + number) % len(texts)], number + index // len(texts)) for index in range(count)]
        prompts = [text[PROMPT * part : PROMPT * (part + 1)] for text, part in places]
        for engine in in_turn:
            time.sleep(_QUIET)
            found.setdefault(str(count), {})[engine.name] = engine.serve(prompts, options.tokens)
    if options.long:
        texts = texts[number % len(texts) :] + texts
        long = [token for text in texts for token in text[: 4 * PROMPT]][:LONG]
        for engine in in_turn:
            time.sleep(_QUIET)
            found.setdefault(LONG_PROMPT, {})[engine.name] = engine.serve([long], 1)
    return found


def summary(record: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Medians, least and most over rounds; ratios are within a round."""
    rounds = record["rounds"]
    found: dict[str, Any] = {"storage, GiB/s": _spread([entry["bytes_per_second"] / 2**30 for entry in rounds])}
    for load in rounds[0]["arms"]:
        stock = [entry["arms"][load]["stock"] for entry in rounds]
        for name in names[1:]:
            ours = [entry["arms"][load][name] for entry in rounds]
            seconds = [entry["bytes_per_second"] for entry in rounds]
            pairs = list(zip(ours, stock, seconds, strict=True))
            cell = {
                "same tokens": [one["tokens"] for one in ours] == [one["tokens"] for one in stock],
                "throughput over stock": _spread([base["seconds"] / one["seconds"] for one, base, _ in pairs]),
            }
            if load == LONG_PROMPT:
                cell |= _prompt(pairs, record["experts_bytes"])
            else:
                cell |= _decode(pairs)
            found[f"{name}, {load}"] = cell
    if "twin" in record:
        base = record["twin"]["peak_bytes"] - record["twin"]["experts_bytes"]
        found["peak memory beyond budget and stock without experts, MiB"] = {
            name: round((record["memory"][name]["peak_bytes"] - record["memory"][name]["budget_bytes"] - base) / 2**20)
            for name in names[1:]
        }
    return found


def _decode(pairs: list[tuple[Any, Any, float]]) -> dict[str, Any]:
    bounds = [max(stock["step_seconds"], ours["step_bytes"] / speed) for ours, stock, speed in pairs]
    steps = [ours["step_seconds"] for ours, _, _ in pairs]
    return {
        "decode over stock": _spread([stock["step_seconds"] / ours["step_seconds"] for ours, stock, _ in pairs]),
        "step over its bound": _spread([step / bound for step, bound in zip(steps, bounds, strict=True)]),
        "step, ms": _spread([1e3 * step for step in steps]),
        "stock's step, ms": _spread([1e3 * stock["step_seconds"] for _, stock, _ in pairs]),
        "MiB read per step": _spread([ours["step_bytes"] / 2**20 for ours, _, _ in pairs]),
        "loads per step": _spread([ours["step_misses"] for ours, _, _ in pairs]),
    }


def _prompt(pairs: list[tuple[Any, Any, float]], experts: int) -> dict[str, Any]:
    once = [experts / speed for _, _, speed in pairs]
    larger = [max(reading, stock["seconds"]) for (_, stock, _), reading in zip(pairs, once, strict=True)]
    seconds = [ours["seconds"] for ours, _, _ in pairs]
    return {
        "over reading all experts once": _spread([one / reading for one, reading in zip(seconds, once, strict=True)]),
        "over the larger of that and stock": _spread([one / bound for one, bound in zip(seconds, larger, strict=True)]),
        "seconds": _spread(seconds),
        "stock's seconds": _spread([stock["seconds"] for _, stock, _ in pairs]),
    }


def _spread(values: list[float]) -> list[float]:
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--twin", type=Path, help="the same model with narrow experts")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--requests", type=int, action="append", help="at a time (1, 8 and 32)")
    parser.add_argument("--arm", action="append", help="BUDGET, or BUDGET,KEY=VALUE,... (100%%, 50%% and 25%%)")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--long", action=argparse.BooleanOptionalAction, default=True, help="a prompt of 2000 tokens, too"
    )
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.requests = options.requests or [1, 8, 32]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    prepare_environment(options.threads)
    catalog = read_catalog(options.checkpoint)
    record: dict[str, Any] = {
        "hardware": asdict(describe_hardware(options.checkpoint)),
        "experts_bytes": catalog.total_expert_bytes,
        "rounds": [],
    }
    arms: dict[str, dict[str, Any] | None] = {"stock": None}
    for arm in options.arm or ("100%", "50%", "25%"):
        budget, *given = arm.split(",")
        arms[arm] = {"budget": budget, **dict(option.split("=", 1) for option in given)}
    texts = load_texts(options.text, options.checkpoint, decode=8, characters=6000).decode
    with contextlib.ExitStack() as stack:
        if options.twin is not None:
            twin = Engine("twin", options.twin, None)
            ids = [twin.llm.get_tokenizer().encode(text.text, add_special_tokens=False) for text in texts]
            one_round([twin], ids, 0, options)
            narrow = read_catalog(options.twin).total_expert_bytes
            record["twin"] = {"peak_bytes": twin.peak_bytes(), "experts_bytes": narrow}
            twin.llm.llm_engine.engine_core.shutdown()
        engines = []
        for name, given in arms.items():
            engine = Engine(name, options.checkpoint, given)
            stack.callback(engine.llm.llm_engine.engine_core.shutdown)
            engines.append(engine)
        record["modes"] = {engine.name: engine.counters().get("mode", "stock") for engine in engines}
        ids = [engines[0].llm.get_tokenizer().encode(text.text, add_special_tokens=False) for text in texts]
        one_round(engines, ids, 0, options)  # the first round warms up
        size = max(part.expert_bytes for layer in catalog.layers for part in layer.parts)
        for number in range(1, options.rounds + 1):
            speed = measure_disk([_sidecar(record["modes"])], read_bytes=size, most_bytes=1 << 30).best
            arms_found = one_round(engines, ids, number, options)
            speed = statistics.fmean(
                [speed, measure_disk([_sidecar(record["modes"])], read_bytes=size, most_bytes=1 << 30).best]
            )
            record["rounds"].append({"bytes_per_second": speed, "arms": arms_found})
            record["memory"] = {
                engine.name: {"peak_bytes": engine.peak_bytes(), "budget_bytes": engine.counters().get("budget_bytes")}
                for engine in engines
            }
            record["summary"] = summary(record, list(arms))
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))


def _sidecar(modes: dict[str, str]) -> Path:
    """Where the experts are read from, off a mode line."""
    line = next(mode for name, mode in modes.items() if name != "stock")
    return Path(line.partition(", sidecar ")[2].partition(",")[0])


if __name__ == "__main__":
    main()
