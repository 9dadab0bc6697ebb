"""Two engines side by side: Expertier and its stock twin, and what they compute."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as C  # noqa: N812

from expertier.catalog.gguf import read_gguf
from expertier.catalog.types import Catalog
from expertier.residency.windows import WindowPool
from expertier_llamacpp import Llama
from expertier_llamacpp.loading import open_files

Kernels = Literal["plain", "repacked"]

SETTINGS: dict[str, Any] = {
    "n_ctx": 128,
    "n_ubatch": 16,
    "n_threads": 1,
    "n_threads_batch": 1,
    "verbose": False,
    "seed": 7,
}
PROMPT: list[int] = np.random.default_rng(0).integers(0, 256, 41).tolist()  # a whole number of no micro-batch
TEXT = "the quick brown fox jumps over the lazy dog "


def settings(**changes: Any) -> dict[str, Any]:
    return {**SETTINGS, **changes}


def stock_twin(path: Path, kernels: Kernels = "plain", **changes: Any) -> llama_cpp.Llama:
    """Load the stock engine with the kernels that Expertier is told to use."""
    load = C.llama_model_load_from_file
    caller = threading.get_ident()

    def patched(name: bytes, params: Any) -> Any:
        if threading.get_ident() == caller:
            params.use_extra_bufts = kernels == "repacked"
        return load(name, params)

    C.llama_model_load_from_file = patched
    try:
        return llama_cpp.Llama(str(path), **settings(**changes))
    finally:
        C.llama_model_load_from_file = load


def expertier(path: Path, budget: str | int, kernels: Kernels = "plain", **changes: Any) -> Llama:
    """Load Expertier."""
    changes.setdefault("expert_repack", "on" if kernels == "repacked" else "off")
    return Llama(str(path), expert_budget=budget, **settings(**changes))


@contextlib.contextmanager
def closing(*models: Any) -> Iterator[Any]:
    """Close models at the end: a failed test must not leave threads to the next one."""
    try:
        yield models[0] if len(models) == 1 else models
    finally:
        for model in models:
            model.close()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the experts of a model need in memory, page padding included."""

    token: int
    layer: int
    total: int
    slot: int

    def micro_batch(self, tokens: int, catalog: Catalog) -> int:
        """Enough for a micro-batch of so many tokens, whatever they route to."""
        return max(
            min(layer.experts, tokens * layer.top_k) * self.layer // max(item.experts for item in catalog.layers)
            for layer in catalog.layers
        )


def sizes(path: Path) -> Sizes:
    catalog = read_gguf(path)
    files = open_files(catalog.files, "buffered")
    pool = WindowPool(catalog.layers, files)
    try:
        slots = {layer: pool.slot_bytes(layer.layer) for layer in catalog.layers}
        return Sizes(
            token=max(layer.top_k * slot for layer, slot in slots.items()),
            layer=max(layer.experts * slot for layer, slot in slots.items()),
            total=sum(layer.experts * slot for layer, slot in slots.items()),
            slot=max(slots.values()),
        )
    finally:
        pool.close()
        for file in files.values():
            file.close()


def last_logits(llm: llama_cpp.Llama) -> np.ndarray[Any, Any]:
    row = C.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(row, (llm.n_vocab(),)).copy()


def trace(llm: llama_cpp.Llama, prompt: Sequence[int] = PROMPT, steps: int = 16) -> list[bytes]:
    """Greedy generation: the bytes of every logits row, the prompt's last one first."""
    rows = []
    tokens = list(prompt)
    for _ in range(steps + 1):
        llm.eval(tokens)
        logits = last_logits(llm)
        rows.append(logits.tobytes())
        tokens = [int(logits.argmax())]
    assert len(set(rows)) == len(rows), "the model repeats itself, equality would say little"
    return rows


def stock_trace(path: Path, kernels: Kernels = "plain", *, steps: int = 16, **changes: Any) -> list[bytes]:
    with closing(stock_twin(path, kernels, **changes)) as llm:
        return trace(llm, steps=steps)
