"""Whether a stated quality budget holds on text that was not calibrated on.

    expertier profile MODEL.gguf --quality --text calibration.json --at 25% --at 50%
    python examples/benchmarks/virtual/check_budget.py MODEL.gguf --budget 1% --text same=a.json --text other=b.json

Every set of texts is decoded token by token with the quality budget in force and its controller at work, by a model
that was loaded afresh and warmed by one text. The exact model's logits at the same positions are the measure.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from expertier.comparison.prompts import read_texts
from expertier.quality import Evaluation, Reference, Sample, evaluate, samples
from expertier_llamacpp import Llama
from expertier_llamacpp.adapter import LlamaCppSession


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE; repeat it for several sets")
    parser.add_argument("--at", action="append", help="memory budget; repeat it for several")
    parser.add_argument("--budget", action="append", help="quality budget; repeat it for several")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=112)
    parser.add_argument("--sidecar-dir")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for named in options.text:
        name, _, file = named.partition("=")
        exact = _session(options, "100%", None)
        chosen = samples(exact, read_texts(Path(file)), count=options.texts, tokens=options.tokens)
        with Reference(exact, chosen) as reference:
            exact.close()
            for memory in options.at or ["25%", "50%"]:
                baseline = _measure(options, memory, None, reference, chosen)[0]
                for budget in options.budget or ["1%"]:
                    found, steering = _measure(options, memory, budget, reference, chosen)
                    results.append(_describe(name, memory, budget, baseline, found, steering))
                    print(json.dumps({key: results[-1][key] for key in _SHOWN}), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


_SHOWN = ("texts", "memory", "budget", "increase", "kl", "agreement", "loads", "exact_loads", "fewer", "steering")


def _session(options: argparse.Namespace, memory: str, budget: str | None) -> LlamaCppSession:
    return LlamaCppSession(
        Llama(
            str(options.model),
            n_ctx=options.tokens,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
            expert_budget=memory,
            expert_quality_budget=budget,
            expert_sidecar_dir=options.sidecar_dir,
            expert_lookahead="off",
            expert_profile="off",
            expert_io_mode="buffered",
        )
    )


def _measure(
    options: argparse.Namespace, memory: str, budget: str | None, reference: Reference, chosen: tuple[Sample, ...]
) -> tuple[Evaluation, dict[str, Any]]:
    session = _session(options, memory, budget)
    found = evaluate(session, reference, warm_up=chosen[-1].tokens)
    llama = session._llama
    steering: dict[str, Any] = {}
    if llama.quality is not None and llama.virtual is not None:
        stats = llama.quality.stats(llama.virtual)
        steering = {
            "calibrated_bias": round(stats.calibrated_bias, 4),
            "bias": round(stats.bias, 4),
            "protect": llama.virtual.settings.protect,
            "back_offs": stats.back_offs,
            "allowed_kl": round(stats.allowed_kl, 5),
            "estimated": round(stats.spent, 5),
            "estimated_kl": round(stats.spent_kl, 5),
        }
    session.close()
    return found, steering


def _describe(
    name: str, memory: str, budget: str, exact: Evaluation, found: Evaluation, steering: dict[str, Any]
) -> dict[str, Any]:
    domains = {
        domain: Evaluation(texts=tuple(text for text in found.texts if text.domain == domain))
        for domain in dict.fromkeys(text.domain for text in found.texts)
    }
    interval = found.perplexity_increase()
    return {
        "texts": name,
        "memory": memory,
        "budget": budget,
        "tokens": found.tokens,
        "increase": [round(value, 5) for value in (interval.low, interval.middle, interval.high)],
        "kl": round(found.kl, 5),
        "agreement": round(found.agreement, 4),
        "loads": round(found.loads_per_token, 3),
        "exact_loads": round(exact.loads_per_token, 3),
        "fewer": round(exact.loads_per_token / found.loads_per_token, 2),
        "steering": steering,
        "domains": {
            domain: {"increase": round(each.perplexity_increase().middle, 5), "kl": round(each.kl, 5)}
            for domain, each in domains.items()
        },
    }


if __name__ == "__main__":
    main()
