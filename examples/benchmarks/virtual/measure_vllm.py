"""What virtual experts buy and cost in vLLM: throughput, loads and perplexity, against exact and against all resident.

    python examples/benchmarks/virtual/measure_vllm.py MODEL_DIRECTORY --text prompts.json --bias 0.2

All arms are loaded at the same time, each in processes of its own, and serve the same texts in turns: a machine that
is busy with something else slows all of them alike. Texts are held out and given token by token, whatever a model would
have said, so that all arms compute the same tokens; what they would have said is compared with the exact model's answer
at every position. Timed are steps in which every request decodes, not prompts.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from expertier.comparison.hardware import cores, describe_hardware
from expertier.comparison.prompts import interleaved, read_texts
from expertier.comparison.records import shareable
from expertier.quality.evaluation import compare
from expertier.quality.statistics import bootstrap
from expertier.telemetry import Stats
from expertier_vllm.metrics import summed
from expertier_vllm.offline import GIVEN_TOKENS, GivenTexts, open_engine, prepare_environment

PROMPT = 32
ALL = "all resident"

Said = list[list[NDArray[np.float32]]]
"""Of each text, what the model said at every position."""


@dataclass
class Row:
    """What one arm did with so many requests at a time.

    Attributes
    ----------
    tokens_per_second : list of float
        Of every group of texts, in steps in which all of them decode.
    loads, bytes_read, decoded : int
        Over all of these steps.
    positions, nll, kl : list
        Number of positions compared of each text, what it lost there in nats, and the divergence.
    agreed : int
        Positions with the same likeliest token.
    """

    tokens_per_second: list[float] = field(default_factory=list)
    loads: int = 0
    bytes_read: int = 0
    decoded: int = 0
    positions: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreed: int = 0

    def serve(self, llm: Any, texts: list[list[int]]) -> Said:
        """Decode texts at the same time; return what was said at every position."""
        said: Said = [[] for _ in texts]
        before = None
        given = GivenTexts(llm, texts, prompt=PROMPT)
        for _ in given:
            if not all(answer.tokens for answer in given.answers):
                continue
            if before is None:  # the last prompt has just ended
                before, start = counters(llm), max(answer.at[-1] for answer in given.answers)
                begun = [len(answer.tokens) for answer in given.answers]
            for text, answer in enumerate(given.answers):
                if len(answer.tokens) > begun[text] + len(said[text]):
                    said[text].append(given.logits(text))
        after = counters(llm)
        assert before is not None
        end = min(answer.at[-1] for answer in given.answers)
        decoded = sum(sum(start < at <= end for at in answer.at) for answer in given.answers)
        self.tokens_per_second.append(decoded / (end - start))
        self.loads += after.decode.misses + after.decode.late - before.decode.misses - before.decode.late
        self.bytes_read += after.bytes_read - before.bytes_read
        self.decoded += decoded
        return said

    def judge(self, texts: list[list[int]], said: Said, exact: Said) -> None:
        """Compare what was said with what the exact model said."""
        for text, rows, true in zip(texts, said, exact, strict=True):
            following = text[len(text) - len(rows) + 1 :]  # none follows the last
            found = [compare(*both) for both in zip(rows, true, following, strict=False)]
            self.positions.append(len(found))
            self.nll.append(sum(one.nll - one.exact_nll for one in found))
            self.kl.append(sum(one.kl for one in found))
            self.agreed += sum(one.agreed for one in found)

    def summary(self, full: Row) -> dict[str, Any]:
        """Plain figures, against the arm with everything resident."""
        increase = bootstrap(np.array(self.nll), np.array(self.positions, float)).map(np.expm1)
        return {
            "tokens_per_second": statistics.median(self.tokens_per_second),
            "against_all_resident": statistics.median(
                own / other for own, other in zip(self.tokens_per_second, full.tokens_per_second, strict=True)
            ),
            "loads_waited_for_per_token": self.loads / self.decoded,
            "bytes_per_token": self.bytes_read / self.decoded,
            "perplexity": increase if math.isfinite(increase.high) else None,  # too few texts say nothing
            "kl": sum(self.kl) / sum(self.positions),
            "agreement": self.agreed / sum(self.positions),
            "groups": self.tokens_per_second,
        }


def counters(llm: Any) -> Stats:
    """What the worker counts."""
    return summed(llm.collective_rpc("expertier_stats"))


def measure(llms: dict[str, Any], groups: list[list[list[int]]], until: float) -> dict[str, Row]:
    """Serve every group of texts with every arm, in turns, until there is no time left; the first one warms up."""
    rows: dict[str, Row] = {}
    names = [name for name in llms if name != ALL]
    for turn, group in enumerate([groups[0], *groups]):
        if turn > 1 and time.monotonic() > until:
            break
        if turn == 1:
            rows.clear()
        exact: Said = []
        for name in (ALL, *(names[::-1] if turn % 2 else names)):
            row = rows.setdefault(name, Row())
            said = row.serve(llms[name], group)
            exact = exact or said
            row.judge(group, said, exact)
        print({name: round(row.tokens_per_second[-1], 1) for name, row in rows.items()}, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--bias", action="append", help="or BIAS/on, BIAS/off: with loads ahead, or without")
    parser.add_argument("--requests", type=int, action="append", help="at a time; repeat it")
    parser.add_argument("--groups", type=int, default=6, help="most groups of so many texts, served once by every arm")
    parser.add_argument("--tokens", type=int, default=32, help="decoded of each text")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--seconds", type=float, default=1200, help="begin no group after so long")
    options = parser.parse_args()
    counts, began = options.requests or [1, 16], time.monotonic()
    prepare_environment(options.threads)

    def load(**more: Any) -> Any:
        return open_engine(
            options.model,
            {"profile": "off", "predictor": "off", **more},
            context=PROMPT + options.tokens + 8,
            step_tokens=256,
            requests=max(counts),
            cache_bytes=256 << 20,
            processors=(GIVEN_TOKENS,),
        )

    llms = {ALL: load(budget="100%"), "exact": load(budget=options.budget)}
    for arm in options.bias or ["0.2"]:
        bias, _, ahead = arm.partition("/")
        llms[f"bias {arm}"] = load(budget=options.budget, virtual_bias=float(bias), lookahead=ahead or "auto")
    tokenizer, length = llms[ALL].get_tokenizer(), PROMPT + options.tokens
    cut = (tokenizer.encode(text.text[: 16 * length]) for text in interleaved(read_texts(options.text)))
    texts = list(itertools.islice((one[:length] for one in cut if len(one) >= length), options.groups * max(counts)))
    found: dict[str, Any] = {}
    for number, count in enumerate(counts, 1):
        groups = [texts[start : start + count] for start in range(0, len(texts) - count + 1, count)][: options.groups]
        rows = measure(llms, groups, began + options.seconds * number / len(counts))
        found[str(count)] = {name: row.summary(rows[ALL]) for name, row in rows.items()}
    record = {
        "hardware": describe_hardware(options.model),
        "model": options.model.name,
        "budget": options.budget,
        "decoded_per_text": options.tokens,
        "requests": found,
        "stats": {name: llm.collective_rpc("expertier_stats")[0] for name, llm in llms.items()},
    }
    print(shareable(record, options.model), flush=True)
    for llm in llms.values():
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
