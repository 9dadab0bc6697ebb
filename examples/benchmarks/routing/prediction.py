"""What prediction gains, in simulated time: who stays, and loads ahead, at several budgets and batch sizes.

    python examples/benchmarks/routing/prediction.py TRACE --predictor FOLDER --model model.gguf --out prediction.json

The trace needs token ids, and inputs of routers for the lookahead (``expertier profile ... --trace-tokens on
--trace-hidden 1``). Routes do not depend on a model's width, so a narrow one is recorded and its experts are taken to
have the size of a wide one. Results are added to those that the record holds already.

With ``--loads-ahead`` the budgets are replayed with loads ahead from several chances up (``--chance``): how many loads
are under way in time for how many more bytes than without, beside what the adapters do (``usual``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from expertier.budget import parse_budget
from expertier.routing import GainGate, read_trace
from expertier.simulation import Events, Timing, load_events
from expertier.simulation.predicted import Sources
from expertier.simulation.prefetch import replay_timed
from expertier.simulation.sweep import Arm, plan_arms, run_arm


def widened(events: Events, expert_bytes: int) -> Events:
    """The same routes with experts of another size."""
    layers = tuple(
        dataclasses.replace(layer, slot_bytes=expert_bytes, read_bytes=(expert_bytes,), stages=3)
        for layer in events.header.layers
    )
    return dataclasses.replace(events, header=dataclasses.replace(events.header, layers=layers))


def side_by_side(events: Events, batch: int) -> Events:
    """Decode so many requests together instead of one after the other; those of a round end together.

    Every event must be a decode step of one token.
    """
    layers = len(events.header.layers)
    length = int(np.bincount(events.requests)[np.unique(events.requests)].min())
    firsts = np.array([np.flatnonzero(events.requests == one)[0] for one in np.unique(events.requests)])
    firsts = firsts[: len(firsts) // batch * batch].reshape(-1, batch)
    tokens = (firsts[:, None, :] + np.arange(length)[:, None]).reshape(-1, batch)  # (steps, batch)
    assert events.route_starts[-1] % (len(events.tokens) * layers) == 0, "one token in every step, through all layers"
    routes = events.route_experts.reshape(len(events.tokens), layers, -1)[tokens]  # (steps, batch, layers, top_k)
    routes = routes.transpose(0, 2, 1, 3).reshape(len(tokens) * layers, -1)
    sets = [np.unique(row) + events.base[place % layers] for place, row in enumerate(routes)]
    ids = events.token_ids
    return dataclasses.replace(
        events,
        phase=np.zeros(len(tokens), np.uint8),
        tokens=np.full(len(tokens), batch),
        step=np.repeat(np.arange(len(tokens)), layers),
        layer=np.tile(np.arange(layers), len(tokens)),
        route_starts=np.arange(len(routes) + 1) * routes.shape[1],
        route_experts=routes.ravel(),
        set_starts=np.concatenate([[0], np.cumsum([len(one) for one in sets])]),
        set_experts=np.concatenate(sets),
        requests=events.requests[tokens].ravel(),
        positions=events.positions[tokens].ravel(),
        token_ids=None if ids is None else ids[tokens].ravel(),
        hidden_event=np.empty(0, np.int64),
        hidden=np.empty((0, 0), np.float16),
    )


def loads_ahead(
    events: Events, budgets: list[tuple[str, int]], chances: list[float], timing: Timing, sources: Sources
) -> Iterator[dict[str, Any]]:
    """Replay with loads ahead from several chances up, gate open; without any, and by LFU, first."""
    usual = {"gate": GainGate("on"), "name": "blend+lookahead"}
    settings: list[tuple[str, str, dict[str, Any] | None]] = [
        ("no prediction", "lfu", None),
        ("none", "predictive", {"name": "blend", "load": False, "gate": GainGate("off")}),
        *((f"{chance:g}", "predictive", {**usual, "least": chance, "least_doubtful": chance}) for chance in chances),
        ("usual", "predictive", usual),
    ]
    for text, budget in budgets:
        without = 0
        for label, policy, options in settings:
            loads = None if options is None else sources.loads(events, **options)
            found = replay_timed(events, policy, budget, timing, loads=loads, fill=True)
            if label == "none":
                without = found.bytes_read
            yield {
                "budget": text,
                "from_chance": label,
                "policy": policy,
                "tokens": found.tokens,
                "ms_per_token": round(1e3 * found.seconds / found.steps, 2),
                "mb_per_token": round(found.bytes_read / found.tokens / 1e6, 1),
                "extra_bytes": round(found.bytes_read / without - 1, 3) if without else None,
                "under_way_in_time": round(found.ahead / max(found.ahead + found.misses, 1), 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--predictor", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", action="append", default=[])
    parser.add_argument("--prefetch", action="append", default=[])
    parser.add_argument("--policy", action="append", default=[])
    parser.add_argument("--loads-ahead", action="store_true")
    parser.add_argument("--chance", action="append", type=float, default=[])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--expert-mb", type=float, default=18.9)
    parser.add_argument("--bandwidth-gb", type=float, default=2.9)
    parser.add_argument("--compute-ms", type=float, default=32.0)
    parser.add_argument(
        "--prediction-ms", type=float, default=0.0, help="the engine's own time, as check_simulator has it"
    )
    given = parser.parse_args()
    events = load_events(read_trace(given.trace), most_tokens=given.tokens)
    events = widened(events, int(given.expert_mb * 1e6))
    if given.batch > 1:
        events = side_by_side(events, given.batch)
    timing = Timing(
        bandwidth=given.bandwidth_gb * 1e9,
        compute=given.compute_ms / 1e3,
        latency=1e-4,
        load_cost=5e-5,
        prediction=given.prediction_ms / 1e3,
    )
    sources = Sources(predictor=given.predictor, model=given.model)
    total = events.header.total_bytes
    budgets = [(text, parse_budget(text, total) or 0) for text in given.budget]
    record = (
        json.loads(given.out.read_text()) if given.out.exists() else {"timing": dataclasses.asdict(timing), "arms": []}
    )
    if given.loads_ahead:
        record["loads_ahead"] = {"timing": dataclasses.asdict(timing), "rows": []}
        for row in loads_ahead(events, budgets, given.chance, timing, sources):
            print(row, flush=True)
            record["loads_ahead"]["rows"].append(row)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
        return
    # A predictor makes every arm of the policy `predictive` listen; without one it goes by past uses.
    alone: list[Arm] = plan_arms(budgets, ["predictive"], ())[:1] if "predictive" in given.policy else []
    for arm in [*alone, *plan_arms(budgets, given.policy, given.prefetch, sources)]:
        found = dataclasses.asdict(run_arm(events, arm, timing, sources=sources))
        found |= {"batch": given.batch, "tokens": events.decode_tokens}
        print({name: value for name, value in found.items() if not isinstance(value, dict)}, flush=True)
        record["arms"].append(found)
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
