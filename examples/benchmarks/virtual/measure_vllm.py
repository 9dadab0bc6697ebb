"""What virtual experts buy and cost in vLLM: throughput, loads and perplexity, against exact and against all resident.

    python examples/benchmarks/virtual/measure_vllm.py MODEL_DIRECTORY --text prompts.json --requests 16 --bias 0.2

All arms are loaded at the same time, each in processes of its own, and serve the same texts in turns: a machine that
is busy with something else slows all of them alike. Texts are held out and given token by token, whatever a model would
have said, so that all arms compute the same tokens; what they would have said is compared with the exact model's answer
at every position. Timed are steps in which every request decodes, not prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from expertier.comparison.hardware import cores, describe_hardware
from expertier.comparison.prompts import interleaved, read_texts
from expertier.quality.evaluation import compare
from expertier.quality.statistics import bootstrap
from expertier_vllm.metrics import summed
from expertier_vllm.offline import GIVEN_TOKENS, GivenTexts, open_engine, prepare_environment

PROMPT = 32
ALL = "all resident"


@dataclass
class Arm:
    """One engine, and what it did in every round.

    Attributes
    ----------
    tokens_per_second : list of float
        Of steps in which all requests decode.
    loads, bytes_read, decoded : int
        Over all of these steps.
    positions, nll, kl : list
        Number of positions compared of each text, what it lost there in nats, and the divergence.
    agreed : int
        Positions with the same likeliest token.
    """

    llm: Any
    tokens_per_second: list[float] = field(default_factory=list)
    loads: int = 0
    bytes_read: int = 0
    decoded: int = 0
    positions: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreed: int = 0

    def serve(self, texts: list[list[int]]) -> tuple[float, list[list[NDArray[np.float32]]]]:
        """Decode texts at the same time; return tokens per second and what was said at every position."""
        said: list[list[NDArray[np.float32]]] = [[] for _ in texts]
        before = None
        given = GivenTexts(self.llm, texts, prompt=PROMPT)
        for _ in given:
            if not all(answer.tokens for answer in given.answers):
                continue
            if before is None:  # the last prompt has just ended
                before, start = self.counters(), max(answer.at[-1] for answer in given.answers)
                begun = [len(answer.tokens) for answer in given.answers]
            for text, answer in enumerate(given.answers):
                if len(answer.tokens) > max(begun[text], len(said[text]) + begun[text]):
                    said[text].append(given.logits(text))
        after = self.counters()
        assert before is not None
        end = min(answer.at[-1] for answer in given.answers)
        decoded = sum(sum(start < at <= end for at in answer.at) for answer in given.answers)
        self.loads += after.decode.misses + after.decode.late - before.decode.misses - before.decode.late
        self.bytes_read += after.bytes_read - before.bytes_read
        self.decoded += decoded
        return decoded / (end - start), said

    def counters(self) -> Any:
        """What the worker counts."""
        return summed(self.llm.collective_rpc("expertier_stats"))


def measure(arms: dict[str, Arm], texts: list[list[list[int]]], rounds: int) -> None:
    """Serve every group of texts with every arm, in turns; the first round warms up."""
    for turn in range(-1, rounds):
        names = list(arms) if turn % 2 else list(arms)[::-1]
        names.remove(ALL)
        exact: list[list[NDArray[np.float32]]] = []
        for group in texts[max(turn, 0) :: rounds]:
            for name in (ALL, *names):
                arm = arms[name]
                kept = (arm.loads, arm.bytes_read, arm.decoded)
                speed, said = arm.serve(group)
                if name == ALL:
                    exact = said
                if turn < 0:
                    arm.loads, arm.bytes_read, arm.decoded = kept
                    continue
                arm.tokens_per_second.append(speed)
                for text, rows, true in zip(group, said, exact, strict=True):
                    following = text[len(text) - len(rows) + 1 :]  # none follows the last
                    found = [compare(*both) for both in zip(rows, true, following, strict=False)]
                    arm.positions.append(len(found))
                    arm.nll.append(sum(one.nll - one.exact_nll for one in found))
                    arm.kl.append(sum(one.kl for one in found))
                    arm.agreed += sum(one.agreed for one in found)
            print(f"round {turn + 1}", {name: round(arms[name].tokens_per_second[-1], 1) for name in arms if turn >= 0},
                  file=sys.stderr, flush=True)  # fmt: skip
            if turn < 0:
                break


def main() -> None:
    """Measure and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--bias", type=float, action="append")
    parser.add_argument("--requests", type=int, default=1, help="at a time")
    parser.add_argument("--groups", type=int, default=5, help="groups of so many texts, each served once by every arm")
    parser.add_argument("--tokens", type=int, default=64, help="decoded of each text")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--no-exact", action="store_true", help="leave out the exact arm with the same budget")
    parser.add_argument("--lookahead", default="auto", help="of the lossy arms")
    options = parser.parse_args()
    prepare_environment(options.threads)

    def load(**more: Any) -> Arm:
        return Arm(
            open_engine(
                options.model,
                {"profile": "off", "predictor": "off", **more},
                context=PROMPT + options.tokens + 8,
                step_tokens=256,
                requests=options.requests,
                cache_bytes=256 << 20,
                processors=(GIVEN_TOKENS,),
            )
        )

    arms = {ALL: load(budget="100%")}
    if not options.no_exact:
        arms["exact"] = load(budget=options.budget)
    for bias in options.bias or [0.2]:
        lossy = {"budget": options.budget, "virtual_bias": bias, "lookahead": options.lookahead}
        arms[f"bias {bias:g}"] = load(**lossy)
    tokenizer = arms[ALL].llm.get_tokenizer()
    length = PROMPT + options.tokens
    texts = []
    for text in interleaved(read_texts(options.text)):
        tokens = tokenizer.encode(text.text, add_special_tokens=False)[:length]
        if len(tokens) == length:
            texts.append(tokens)
        if len(texts) == options.groups * options.requests:
            break
    groups = [texts[start : start + options.requests] for start in range(0, len(texts), options.requests)]
    measure(arms, groups, len(groups))
    full = arms[ALL].tokens_per_second
    record = {
        "hardware": describe_hardware(options.model),
        "model": options.model.name,
        "budget": options.budget,
        "requests": options.requests,
        "texts": len(texts),
        "decoded_per_text": options.tokens,
        "arms": {
            name: {
                "tokens_per_second": statistics.median(arm.tokens_per_second),
                "against_all_resident": statistics.median(
                    own / other for own, other in zip(arm.tokens_per_second, full, strict=True)
                ),
                "loads_per_token": arm.loads / arm.decoded,
                "bytes_per_token": arm.bytes_read / arm.decoded,
                "perplexity": bootstrap(np.array(arm.nll), np.array(arm.positions, float)).map(np.expm1),
                "kl": sum(arm.kl) / sum(arm.positions),
                "agreement": arm.agreed / sum(arm.positions),
                "rounds": arm.tokens_per_second,
                "stats": arm.llm.collective_rpc("expertier_stats")[0],
            }
            for name, arm in arms.items()
        },
    }
    print(json.dumps(record, indent=1, default=vars), flush=True)
    for arm in arms.values():
        arm.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
