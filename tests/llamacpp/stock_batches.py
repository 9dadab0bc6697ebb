"""What a batch engine asked of llama.cpp, and stock llama.cpp asked the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from expertier_llamacpp import BatchEngine


@dataclass
class Recorded:
    """Calls in order: ("decode", tokens, positions, sequences, wanted) or the name of a memory call with its arguments.

    `logits` are the wanted rows of every decode.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    logits: list[bytes] = field(default_factory=list)

    @property
    def steps(self) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == "decode"]


_MEMORY_CALLS = ("llama_memory_seq_rm", "llama_memory_seq_cp")


def record(engine: BatchEngine, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Note from now on what an engine asks of llama.cpp."""
    recorded = Recorded()
    context: Any = engine.llama._ctx
    decode = context.decode

    def noted(batch: Any) -> None:
        raw, count = batch.batch, batch.n_tokens()
        wanted = [bool(raw.logits[row]) for row in range(count)]
        sequences = [raw.seq_id[row][0] for row in range(count)]
        recorded.calls.append(("decode", raw.token[:count], raw.pos[:count], sequences, wanted))
        decode(batch)
        recorded.logits += _rows(context.ctx, wanted, engine.llama.n_vocab())

    context.decode = noted
    for name in _MEMORY_CALLS:
        stock = getattr(llama_cpp, name)

        def call(memory: Any, *arguments: Any, name: str = name, stock: Any = stock) -> Any:
            if memory == context.memory:
                recorded.calls.append((name, *arguments))
            return stock(memory, *arguments)

        monkeypatch.setattr(llama_cpp, name, call)
    return recorded


def _rows(context: Any, wanted: list[bool], width: int) -> list[bytes]:
    rows = [llama_cpp.llama_get_logits_ith(context, row) for row in np.flatnonzero(wanted).tolist()]
    return [np.ctypeslib.as_array(row, (width,)).tobytes() for row in rows]


@contextlib.contextmanager
def stock_context(path: Path, *, n_ctx: int, n_batch: int, n_ubatch: int, sequences: int) -> Iterator[Any]:
    """A context of stock llama.cpp for several sequences, through its low-level API alone."""
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_ubatch
    params.n_seq_max, params.kv_unified = sequences, True
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as llama_cpp.Llama asks for by default
    context = llama_cpp.llama_init_from_model(model, params)
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def replay(context: Any, calls: list[tuple[Any, ...]]) -> list[bytes]:
    """Ask the same of stock llama.cpp; return the wanted rows of every decode."""
    memory = llama_cpp.llama_get_memory(context)
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context)))
    batch = llama_cpp.llama_batch_init(llama_cpp.llama_n_batch(context), 0, 1)
    logits = []
    try:
        for name, *arguments in calls:
            if name != "decode":
                getattr(llama_cpp, name)(memory, *arguments)
                continue
            tokens, positions, sequences, wanted = arguments
            batch.n_tokens = len(tokens)
            for row in range(len(tokens)):
                batch.token[row], batch.pos[row] = tokens[row], positions[row]
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequences[row]
                batch.logits[row] = wanted[row]
            assert llama_cpp.llama_decode(context, batch) == 0
            logits += _rows(context, wanted, width)
    finally:
        llama_cpp.llama_batch_free(batch)
    return logits
