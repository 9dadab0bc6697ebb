"""Serve the same mixed traffic in vLLM under several schedulers, in turns, in one engine.

The scheduler's strategy is changed between runs while nothing is under way; engine, pool of experts and what has been
learned of tokens stay. Prompts differ from run to run, and are the same for all strategies of a round.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from expertier.comparison.prompts import read_texts
from expertier.comparison.traffic import Ask, mixed_requests
from expertier.scheduling import make_batcher
from expertier.scheduling.arrivals import Arrivals, poisson_seconds
from expertier_vllm.offline import greedy, open_engine, prepare_environment


def serve(llm: Any, asks: list[Ask], arrivals: Arrivals, name: str) -> dict[str, Any]:
    """Serve requests; returns tokens by request, seconds to the first one, and what the worker read."""
    engine = llm.llm_engine
    before = llm.collective_rpc("expertier_stats")[0]
    begin = time.perf_counter()
    asked: dict[str, float] = {}
    first: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    over = 0
    while over < len(asks):
        now = time.perf_counter() - begin
        for number, at in arrivals.due(now, len(asked) - over):
            asked[f"{name}-{number}"] = at
            prompt = {"prompt_token_ids": list(asks[number].prompt)}
            engine.add_request(f"{name}-{number}", prompt, greedy(asks[number].output))
        if len(asked) == over:
            time.sleep(max(0.0, arrivals.next_at - now))
            continue
        for output in engine.step():
            got = list(output.outputs[0].token_ids)
            if got and output.request_id not in first:
                first[output.request_id] = time.perf_counter() - begin - asked[output.request_id]
            tokens[output.request_id] = got
            over += output.finished
    seconds = time.perf_counter() - begin
    after = llm.collective_rpc("expertier_stats")[0]
    count = sum(len(got) for got in tokens.values())
    loads = sum(after[phase]["misses"] - before[phase]["misses"] for phase in ("decode", "prefill"))
    waits = np.percentile(list(first.values()), (50, 99))
    return {
        "tokens_per_second": count / seconds,
        "loads_per_token": loads / count,
        "bytes_per_token": (after["bytes_read"] - before["bytes_read"]) / count,
        "first_token_p50": float(waits[0]),
        "first_token_p99": float(waits[1]),
        "answers": [tokens[f"{name}-{number}"] for number in range(len(asks))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="JSON list of objects with domain and text")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--domains", type=int, default=8)
    parser.add_argument("--prompt", type=int, nargs=2, default=(32, 96))
    parser.add_argument("--output", type=int, nargs=2, default=(16, 48))
    parser.add_argument("--rate", type=float, help="requests a second, Poisson; without it all are there at once")
    parser.add_argument("--arm", action="append", help="fcfs and greedy if not given")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", type=int, default=16, help="requests served before the first round")
    parser.add_argument("--lookahead", default="auto", help="as the option of that name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    arms = given.arm or ["fcfs", "greedy"]

    prepare_environment(given.threads)
    options = {"budget": given.budget, "scheduler": "greedy", "lookahead": given.lookahead}
    llm = open_engine(given.model, options, context=512, step_tokens=512, requests=given.batch, cache_bytes=256 << 20)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    tokenizer = llm.get_tokenizer()
    texts = read_texts(given.text)

    def asks(count: int, seed: int) -> list[Ask]:
        return mixed_requests(
            texts,
            lambda text: tokenizer(text)["input_ids"],
            count,
            domains=given.domains,
            prompt=tuple(given.prompt),
            output=tuple(given.output),
            seed=seed,
        )

    if given.warm:
        serve(llm, asks(given.warm, 10_000), Arrivals(given.warm, clients=given.warm), "warm")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    for name in ("model", "text", "out"):
        settings[name] = Path(settings[name]).name
    runs = []
    for number in range(given.rounds):
        found: dict[str, list[list[int]]] = {}
        for arm in arms if number % 2 == 0 else arms[::-1]:
            scheduler.admission.batcher = make_batcher(arm)
            seconds = None if given.rate is None else poisson_seconds(given.requests, given.rate, number)
            arrivals = Arrivals(given.requests, seconds=seconds, clients=given.requests)
            result = serve(llm, asks(given.requests, number), arrivals, f"{number}-{arm}")
            found[arm] = result.pop("answers")
            runs.append({"round": number, "arm": arm, **result})
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in runs[-1].items()})
        same = {arm: float(np.mean([a == b for a, b in zip(found[arm], found[arms[0]], strict=True)])) for arm in arms}
        runs[-1]["requests_with_the_same_text"] = same
        given.out.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
