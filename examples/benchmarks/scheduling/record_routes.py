"""Record the routes of many texts: whole texts through transformers instead of token by token through an engine.

The trace is for `expertier traffic`, which wants hundreds of texts of every domain; `expertier profile` records what an
engine really does, step by step. Sizes come from the catalog of a second file, e.g. a widened GGUF of the same model,
whose routes are the same.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertier.catalog import read_catalog
from expertier.comparison.prompts import read_texts
from expertier.routing import TraceRecorder
from expertier.routing.trace_header import trace_header


def record(recorder: TraceRecorder, number: int, tokens: np.ndarray, routes: np.ndarray) -> None:
    """Record one text as one step; `routes` has shape (tokens, layers, top_k)."""
    count = len(tokens)
    recorder.begin_step("prefill", requests=np.full(count, number), positions=np.arange(count), token_ids=tokens)
    for place, layer in enumerate(recorder.header.layers):
        recorder.record(layer.layer, routes[:, place])
    recorder.end_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hf", type=Path, help="model that computes the routes, e.g. the narrow one")
    parser.add_argument("--sizes", type=Path, required=True, help="GGUF or checkpoint whose experts are loaded")
    parser.add_argument("--text", type=Path, required=True, help="JSON list of objects with domain and text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-domain", type=int, default=60, help="most pieces of one domain")
    parser.add_argument("--least", type=int, default=20, help="domains with fewer pieces are left out")
    parser.add_argument("--length", type=int, default=384, help="tokens of a piece; two pieces of a text at most")
    given = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(given.hf)
    model: Any = AutoModelForCausalLM.from_pretrained(given.hf, dtype=torch.float32).eval()
    pieces: list[tuple[str, list[int]]] = []
    for text in read_texts(given.text):
        ids = tokenizer(text.text[: 16 * given.length])["input_ids"][: 2 * given.length]
        for start in range(0, len(ids), given.length):
            piece = ids[start : start + given.length]
            if len(piece) > given.length // 2:
                pieces.append((text.domain, piece))
    counts = Counter(domain for domain, _ in pieces)
    taken: Counter[str] = Counter()
    domains: list[str] = []
    header = trace_header(read_catalog(given.sizes), engine="transformers", tokens=True)
    with TraceRecorder(given.out, header) as recorder, torch.no_grad():
        for domain, piece in pieces:
            if counts[domain] < given.least or taken[domain] == given.per_domain:
                continue
            taken[domain] += 1
            logits = model(torch.tensor([piece]), output_router_logits=True).router_logits
            routes = [layer.topk(model.config.num_experts_per_tok, -1).indices.numpy() for layer in logits]
            record(recorder, len(domains), np.array(piece), np.stack(routes, axis=1))
            domains.append(domain)
        recorder.note({"domains": domains})
    print(f"{given.out}: {len(domains)} texts of {len(taken)} domains")


if __name__ == "__main__":
    main()
