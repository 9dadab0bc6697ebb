"""What decoding many sequences together can bring where storage is the limit: loads per token by batch size.

Cuts texts out of a trace (`examples/benchmarks/scheduling/record_routes.py`), decodes them in batches that start and
end together, and replays that: with the engine's eviction policy, and with Belady's rule, which no policy can beat.
With storage that costs nothing only the experts a token needs would count: each is read from memory once per step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from expertier.budget import parse_budget
from expertier.routing import TraceRecorder, read_trace
from expertier.simulation import load_events, replay
from expertier.simulation.belady import belady
from expertier.simulation.requests import RecordedRequest, Texts, cut_requests


def write_batches(path: Path, header: Any, requests: list[RecordedRequest], batch: int, tokens: int) -> None:
    """Write decode steps of `batch` rows, `tokens` of them per group of requests."""
    with TraceRecorder(path, header) as recorder:
        for start in range(0, len(requests) - batch + 1, batch):
            group = requests[start : start + batch]
            routes = np.stack([request.routes[request.prompt : request.prompt + tokens] for request in group], axis=1)
            for position, rows in enumerate(routes):
                recorder.begin_step(
                    "decode",
                    requests=np.arange(start, start + batch),
                    positions=np.full(batch, position),
                    token_ids=np.zeros(batch, np.int64),
                )
                for place, layer in enumerate(header.layers):
                    recorder.record(layer.layer, rows[:, place])
                recorder.end_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    trace = read_trace(given.trace)
    budget = parse_budget(given.budget, trace.header.total_bytes)
    assert budget is not None
    span = (given.tokens, given.tokens)
    requests = cut_requests(
        Texts.of_trace(trace), given.requests, domains=8, prompt=(32, 128), output=(span[0] + 1, span[1] + 1), seed=0
    )
    kinds = {"mixed": requests, "of one domain": sorted(requests, key=lambda request: request.domain)}
    rows: list[dict[str, Any]] = []
    for kind, chosen in kinds.items():
        for batch in given.batch:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "batches"
                write_batches(path, trace.header, chosen, batch, given.tokens)
                events = load_events(read_trace(path))
            count = events.decode_tokens
            ours = int(replay(events, given.policy, budget).misses.sum())
            best = int(belady(events, budget).misses.sum())
            rows.append(
                {
                    "requests": kind,
                    "batch": batch,
                    "needed_per_token": len(events.set_experts) / count,
                    "loads_per_token": ours / count,
                    "loads_per_token_belady": best / count,
                }
            )
            print(rows[-1], flush=True)
    settings = {"trace": given.trace.name, "policy": given.policy, "budget": given.budget, "tokens": given.tokens}
    given.out.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
