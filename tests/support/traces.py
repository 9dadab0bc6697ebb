"""Traces made up for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertier.routing.recorder import TraceRecorder
from expertier.routing.trace import Trace, TraceHeader, TraceLayer, read_trace


def header(
    layers: int = 3, experts: int = 8, top_k: int = 2, *, slot_bytes: Sequence[int] = (4096,), **fields: object
) -> TraceHeader:
    """A model of equal layers; `slot_bytes` may differ from layer to layer."""
    return TraceHeader(
        fingerprint="f" * 64,
        architecture="tiny",
        model="tiny.gguf",
        layers=tuple(
            TraceLayer(
                layer=layer,
                experts=experts,
                top_k=top_k,
                slot_bytes=slot_bytes[layer % len(slot_bytes)],
                read_bytes=(slot_bytes[layer % len(slot_bytes)],),
            )
            for layer in range(layers)
        ),
        **fields,  # type: ignore[arg-type]
    )


def skewed_routes(shape: TraceHeader, tokens: int, seed: int = 0, drift: int = 40) -> NDArray[np.int64]:
    """Routes that repeat themselves and drift, shape (tokens, layers, top_k), for layers of equal size."""
    random = np.random.default_rng(seed)
    layer = shape.layers[0]
    table = np.empty((tokens, len(shape.layers), layer.top_k), np.int64)
    for place in range(len(shape.layers)):
        for token in range(tokens):
            if token % drift == 0:
                liking = random.dirichlet(np.full(layer.experts, 0.5)) + 1e-3
            table[token, place] = random.choice(layer.experts, layer.top_k, replace=False, p=liking / liking.sum())
    return table


def write_trace(path: Path, shape: TraceHeader, routes: NDArray[np.int64], batch: int = 1) -> Trace:
    """Record decode steps of `batch` requests each."""
    with TraceRecorder(path, shape) as recorder:
        for start in range(0, len(routes), batch):
            rows = routes[start : start + batch]
            recorder.begin_step("decode", requests=np.arange(len(rows)), positions=np.full(len(rows), start // batch))
            for place, layer in enumerate(shape.layers):
                recorder.record(layer.layer, rows[:, place])
            recorder.end_step()
    return read_trace(path)
