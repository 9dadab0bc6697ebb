"""Routes made up so that it is known what a predictor can learn of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertier.routing.predictor import RoutedModel
from expertier.routing.recorder import TraceRecorder
from expertier.routing.trace import Trace, TraceHeader, read_trace
from expertier.routing.windows import Windows
from support.traces import header

VOCABULARY = 12


def routed_model(layers: int = 3, experts: int = 8, top_k: int = 2, **fields: str) -> RoutedModel:
    """A model of equal layers, the one of :func:`support.traces.header`."""
    return RoutedModel(
        layers=tuple(range(layers)),
        experts=(experts,) * layers,
        top_k=(top_k,) * layers,
        fingerprint=fields.pop("fingerprint", "f" * 64),
        **fields,
    )


def lawful_text(
    tokens: int, seed: int = 0, layers: int = 3, experts: int = 8
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens at random, and routes of two experts that follow from them.

    The first expert of a layer follows from the token; the second one from the token before, so that only who reads in
    order knows it.
    """
    dice = np.random.default_rng(seed)
    text = dice.integers(0, VOCABULARY, tokens)
    before = np.concatenate([[0], text[:-1]])
    half = experts // 2
    layer = np.arange(layers)
    routes = np.stack([(text[:, None] + layer) % half, half + (before[:, None] + 2 * layer) % half], 2)
    return text, routes


def lawful_windows(count: int = 40, width: int = 32, seed: int = 0, **fields: str) -> Windows:
    """Sequences of lawful text, one in each window."""
    pairs = [lawful_text(width, seed=seed * 1000 + number) for number in range(count)]
    return Windows(
        model=routed_model(**fields),
        tokens=np.stack([text for text, _ in pairs]),
        request=np.arange(count),
        routes=np.stack([routes for _, routes in pairs]).astype(np.int16),
    )


def lawful_trace(
    path: Path,
    *,
    requests: int = 12,
    tokens: int = 24,
    seed: int = 0,
    ids: bool = True,
    domains: Sequence[str] = (),
    **fields: object,
) -> Trace:
    """Record lawful text, of these domains in turn: the first tokens of each request as a prompt, then one by one."""
    shape: TraceHeader = header(3, 8, 2, tokens=ids, **fields)
    with TraceRecorder(path, shape) as recorder:
        for request in range(requests):
            text, routes = lawful_text(tokens, seed=seed * 1000 + request)
            steps = [(0, min(4, tokens))] + [(at, at + 1) for at in range(4, tokens)]
            for start, stop in steps:
                recorder.begin_step(
                    "decode" if stop - start == 1 else "prefill",
                    requests=request,
                    positions=np.arange(start, stop),
                    token_ids=text[start:stop] if ids else None,
                )
                for place in range(3):
                    recorder.record(place, routes[start:stop, place])
                recorder.end_step()
        if domains:
            recorder.note({"domains": [domains[request % len(domains)] for request in range(requests)]})
    return read_trace(path)
