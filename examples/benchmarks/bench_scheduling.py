"""What a decision about who joins costs, from the call to its answer.

    python -m pytest examples/benchmarks/bench_scheduling.py --benchmark-timer time.process_time

Eight requests run, 64 or 256 wait, four places are free: the reference model's shape (8 layers of 32 experts) and that
of Qwen3-30B-A3B (48 of 128). The goal was 2 ms for 64 that wait and 10 ms for 256.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from expertier.scheduling import BATCHERS, CONTROL, Admission, PathBook, Worth, make_batcher

ROOM, RUNNING, TOKENS, VOCABULARY = 4, 8, 64, 4000
SHAPES = {"8x32": (8, 32, 4), "48x128": (48, 128, 8)}
Benchmark = Callable[..., Any]


def crowded(name: str, layers: int, experts: int, top_k: int, waiting: int) -> Admission:
    """Requests whose tokens a server has seen, a few of which run."""
    random = np.random.default_rng(0)
    book = PathBook(layers, experts)
    admission = Admission(make_batcher(name), book, worth=Worth("on"))
    for _ in range(32):
        tokens = random.integers(VOCABULARY, size=TOKENS)
        book.observe(["earlier"] * TOKENS, tokens, random.integers(experts, size=(TOKENS, layers, top_k)))
    for request in range(RUNNING + waiting):
        admission.arrive(request, random.integers(VOCABULARY, size=TOKENS))
    for request in range(RUNNING):
        admission.joined(request)
        routes = random.integers(experts, size=(TOKENS, layers, top_k))
        admission.observe([request] * TOKENS, random.integers(VOCABULARY, size=TOKENS), routes)
    return admission


@pytest.mark.parametrize("waiting", [64, 256])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in BATCHERS if name != CONTROL])
def test_a_decision(benchmark: Benchmark, name: str, shape: str, waiting: int) -> None:
    layers, experts, top_k = SHAPES[shape]
    admission = crowded(name, layers, experts, top_k, waiting)
    resident = (np.random.default_rng(1).random(layers * experts) < 0.5).astype(np.float32)
    assert len(admission.propose(ROOM, resident=resident)) == ROOM
    chosen = benchmark(lambda: admission.propose(ROOM, resident=resident))
    assert admission.stats.failures == 0
    assert len(set(chosen)) == ROOM
