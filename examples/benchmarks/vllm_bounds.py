"""vLLM with and without Expertier in turns, warm: speed, distance from what compute and storage allow, and memory.

    python examples/benchmarks/vllm_bounds.py CHECKPOINT --text prompts.json --twin NARROW --out bounds.json

Stock and Expertier at 100, 50 and 25 % of the experts, each an engine with a worker process of its own, all alive at
the same time and asked one after the other, round by round: a machine that is busy for a while slows all of them. Every
round asks each for 1, 8 and 32 requests at a time and measures the storage under the sidecar. Real text goes in and
sampled text comes out (temperature 0.8, a seed for each request): greedy text repeats itself and flatters caches. What
is measured follows a short request that is not, so that all engines come to it alike.

A decode step is compared with the larger of stock's step and the time that the bytes it read take at that speed, and
with what no policy can go below: the experts of a step that do not fit the budget have to be read in every step. A
prompt is compared with stock's and with the time of reading all experts once.

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
from expertier.comparison.records import shareable
from expertier.planning.calibrate import measure_disk
from expertier_vllm.offline import Steps, open_engine, prepare_environment

PROMPT = 64
LONG = 2000
LONG_PROMPT = f"prompt of {LONG} tokens"
CACHE_BYTES = 288 << 20
_WARM_TOKENS = 4
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

    def serve(self, batches: list[list[list[int]]], tokens: int) -> dict[str, Any]:
        """Answer batches, one after the other; decode steps and what they read are told apart from prompts."""
        found = [self._serve(prompts, tokens, seed) for seed, prompts in enumerate(batches)]
        steps = sum(one["steps"] for one in found)

        def per_step(name: str) -> float | None:
            return sum(one[name] for one in found) / steps if steps else None

        return {
            "tokens": [one["tokens"] for one in found],
            "seconds": sum(one["seconds"] for one in found),
            "first_token_seconds": statistics.median(one["first"] for one in found),
            "step_seconds": per_step("decode_seconds"),
            "steps": steps,
            "step_bytes": per_step("read"),
            "step_misses": per_step("misses"),
            "step_experts": per_step("needed"),
        }

    def _serve(self, prompts: list[list[int]], tokens: int, seed: int) -> dict[str, Any]:
        steps = Steps(self.llm, prompts, sampled(tokens, seed, len(prompts)))
        before: dict[str, Any] = {}
        first = 0.0
        decoded = 0
        for _ in steps:
            decoded += bool(first)
            if not first and all(answer.tokens for answer in steps.answers):
                before, first = self.counters(), steps.seconds
        after = self.counters()
        decode, earlier = after.get("decode", {}), before.get("decode", {})

        def grown(name: str) -> float:
            return decode.get(name, 0) - earlier.get(name, 0)

        return {
            "tokens": [answer.tokens for answer in steps.answers],
            "seconds": steps.seconds,
            "first": first,
            "decode_seconds": steps.seconds - first,
            "steps": decoded,
            "read": after.get("bytes_read", 0) - before.get("bytes_read", 0),
            "misses": grown("misses"),
            "needed": grown("misses") + grown("late") + grown("ready_hits"),
        }


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def sampled(tokens: int, seed: int, requests: int) -> list[Any]:
    """Parameters of requests: the same text whenever it is asked for, and no narrower than text is."""
    from vllm import SamplingParams

    given = {"temperature": 0.8, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    return [SamplingParams(seed=1000 * seed + request, **given) for request in range(requests)]


def one_round(
    engines: list[Engine], texts: list[list[int]], number: int, options: argparse.Namespace, tokens: int
) -> dict[str, dict[str, Any]]:
    """Ask every engine the same; returns figures by number of requests and arm."""
    found: dict[str, dict[str, Any]] = {}
    first = number % len(engines)
    in_turn = engines[first:] + engines[:first]

    def ask(load: str, arms: set[str], batches: list[list[list[int]]], tokens: int) -> None:
        for engine in in_turn:
            if not arms or engine.name in arms | {"stock"}:
                time.sleep(_QUIET)
                engine.serve([[batches[0][0][:16]]], 4)
                found.setdefault(load, {})[engine.name] = engine.serve(batches, tokens)

    for count, arms in options.requests:
        places = [
            (texts[(index + number) % len(texts)], number + index // len(texts))
            for index in range(count if count > 1 else options.alone)
        ]
        prompts = [text[PROMPT * part : PROMPT * (part + 1)] for text, part in places]
        ask(str(count), arms, [[prompt] for prompt in prompts] if count == 1 else [prompts[:count]], tokens)
    if options.long is not None:
        texts = texts[number % len(texts) :] + texts
        long = [token for text in texts for token in text[: 4 * PROMPT]][:LONG]
        ask(LONG_PROMPT, options.long, [[long]], 1)
    return found


def summary(record: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Medians, least and most over rounds; ratios are within a round."""
    rounds = record["rounds"]
    found: dict[str, Any] = {"storage, GiB/s": _spread([entry["bytes_per_second"] / 2**30 for entry in rounds])}
    for load in rounds[0]["arms"]:
        stock = [entry["arms"][load]["stock"] for entry in rounds]
        for name in names[1:]:
            if name not in rounds[0]["arms"][load]:
                continue
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
                cell |= _decode(pairs, record["memory"][name]["budget_bytes"], record["expert_bytes"])
            found[f"{name}, {load}"] = cell
    if "twin" in record:
        base = record["twin"]["peak_bytes"] - record["twin"]["experts_bytes"]
        found["peak memory beyond budget and stock without experts, MiB"] = {
            name: round((record["memory"][name]["peak_bytes"] - record["memory"][name]["budget_bytes"] - base) / 2**20)
            for name in names[1:]
        }
    return found


def _decode(pairs: list[tuple[Any, Any, float]], budget: int, expert: int) -> dict[str, Any]:
    bounds = [max(stock["step_seconds"], ours["step_bytes"] / speed) for ours, stock, speed in pairs]
    steps = [ours["step_seconds"] for ours, _, _ in pairs]
    # Of a step's experts only so many can be there already, whatever the policy.
    least = [max(0.0, ours["step_experts"] - budget // expert) for ours, _, _ in pairs]
    reading = [loads * expert / speed for loads, (_, _, speed) in zip(least, pairs, strict=True)]
    return {
        "decode over stock": _spread([stock["step_seconds"] / ours["step_seconds"] for ours, stock, _ in pairs]),
        "step over its bound": _spread([step / bound for step, bound in zip(steps, bounds, strict=True)]),
        "step, ms": _spread([1e3 * step for step in steps]),
        "stock's step, ms": _spread([1e3 * stock["step_seconds"] for _, stock, _ in pairs]),
        "MiB read per step": _spread([ours["step_bytes"] / 2**20 for ours, _, _ in pairs]),
        "misses per step": _spread([ours["step_misses"] for ours, _, _ in pairs]),
        "experts per step": _spread([ours["step_experts"] for ours, _, _ in pairs]),
        "decode over stock at most, with these bytes": _spread(
            [stock["step_seconds"] / bound for bound, (_, stock, _) in zip(bounds, pairs, strict=True)]
        ),
        "decode over stock at most, with the fewest loads of any policy": _spread(
            [
                stock["step_seconds"] / max(stock["step_seconds"], time)
                for time, (_, stock, _) in zip(reading, pairs, strict=True)
            ]
        ),
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
    parser.add_argument(
        "--requests", type=_load, action="append", help="at a time, and after colons whom to ask (1, 8 and 32, all)"
    )
    parser.add_argument("--arm", action="append", help="BUDGET, or BUDGET,KEY=VALUE,... (100%%, 50%% and 25%%)")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--alone", type=int, default=4, help="texts in turn where requests come one at a time (4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="begin no round that would end later than this")
    parser.add_argument("--no-long", dest="long", action="store_const", const=None, help="no prompt of 2000 tokens")
    parser.add_argument("--long", type=lambda text: set(text.split(":")), default=set(), help="whom to ask it (all)")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.requests = options.requests or [(count, set()) for count in (1, 8, 32)]
    started = time.perf_counter()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    prepare_environment(options.threads)
    catalog = read_catalog(options.checkpoint)
    record: dict[str, Any] = {
        "hardware": asdict(describe_hardware(options.checkpoint)),
        "experts_bytes": catalog.total_expert_bytes,
        "expert_bytes": max(layer.expert_bytes for layer in catalog.layers),
        "tokens": options.tokens,
        "rounds": [],
    }
    arms: dict[str, dict[str, Any] | None] = {"stock": None}
    for arm in options.arm or ("100%", "50%", "25%"):
        budget, *given = arm.split(",")
        values = dict(option.split("=", 1) for option in given)
        name = ",".join([budget, *(f"{key}={Path(value).name}" for key, value in values.items())])  # no machine's paths
        arms[name] = {"budget": budget, **values}
    texts = load_texts(options.text, options.checkpoint, decode=8, characters=6000).decode
    with contextlib.ExitStack() as stack:
        if options.twin is not None:
            twin = Engine("twin", options.twin, None)
            ids = [twin.llm.get_tokenizer().encode(text.text, add_special_tokens=False) for text in texts]
            one_round([twin], ids, 0, options, options.tokens)
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
        one_round(engines, ids, 0, options, _WARM_TOKENS)  # the first round warms up
        longest = 0.0
        size = max(part.expert_bytes for layer in catalog.layers for part in layer.parts)
        for number in range(1, options.rounds + 1):
            begun = time.perf_counter()
            if options.seconds is not None and begun + longest - started > options.seconds:
                break
            speed = measure_disk([_sidecar(record["modes"])], read_bytes=size, most_bytes=1 << 30).best
            arms_found = one_round(engines, ids, number, options, options.tokens)
            speed = statistics.fmean(
                [speed, measure_disk([_sidecar(record["modes"])], read_bytes=size, most_bytes=1 << 30).best]
            )
            record["rounds"].append({"bytes_per_second": speed, "arms": arms_found})
            record["memory"] = {
                engine.name: {"peak_bytes": engine.peak_bytes(), "budget_bytes": engine.counters().get("budget_bytes")}
                for engine in engines
            }
            record["summary"] = summary(record, list(arms))
            options.out.write_text(shareable(record, options.checkpoint) + "\n")
            longest = max(longest, time.perf_counter() - begun)
    print(json.dumps(record["summary"], indent=1))


def _load(text: str) -> tuple[int, set[str]]:
    """``COUNT`` or ``COUNT:ARM:ARM``: requests at a time, and the arms to ask besides stock."""
    count, *arms = text.split(":")
    return int(count), set(arms)


def _sidecar(modes: dict[str, str]) -> Path:
    """Where the experts are read from, off a mode line."""
    line = next(mode for name, mode in modes.items() if name != "stock")
    return Path(line.partition(", sidecar ")[2].partition(",")[0])


if __name__ == "__main__":
    main()
