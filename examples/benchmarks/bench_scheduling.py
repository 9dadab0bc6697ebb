"""What a decision about who joins costs, from the call to its answer.

    python -m pytest examples/benchmarks/bench_scheduling.py --benchmark-timer time.process_time

Eight requests run, 64 or 256 wait, four places are free: the reference model's shape (8 layers of 32 experts) and that
of Qwen3-30B-A3B (48 of 128). From one decision to the next four have joined, four have left, four have arrived, and
everybody who runs has computed a step. The goal was 2 ms for 64 that wait and 10 ms for 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from expertier.scheduling import BATCHERS, CONTROL, Admission, PathBook, Worth, make_batcher

ROOM, RUNNING, TOKENS, VOCABULARY, ROUNDS = 4, 8, 64, 4000, 51
SHAPES = {"8x32": (8, 32, 4), "48x128": (48, 128, 8)}
Benchmark = Callable[..., Any]


class Crowd:
    """Requests whose tokens a server has seen, a few of which run."""

    def __init__(self, name: str, layers: int, experts: int, top_k: int, waiting: int) -> None:
        self._random = np.random.default_rng(0)
        self._shape = (experts, layers, top_k)
        self.admission = Admission(make_batcher(name), PathBook(layers, experts), worth=Worth("on"))
        self._arrived = 0
        self._running: list[int] = []
        for _ in range(32):
            self._observe(["earlier"] * TOKENS)
        self._arrive(RUNNING + waiting)
        self._join(range(RUNNING))

    def _observe(self, rows: list[Any]) -> None:
        experts, layers, top_k = self._shape
        routes = self._random.integers(experts, size=(len(rows), layers, top_k))
        self.admission.observe(rows, self._random.integers(VOCABULARY, size=len(rows)), routes)

    def _arrive(self, count: int) -> None:
        for _ in range(count):
            self.admission.arrive(self._arrived, self._random.integers(VOCABULARY, size=TOKENS))
            self._arrived += 1

    def _join(self, requests: Iterable[int]) -> None:
        for request in requests:
            self.admission.joined(request)
            self._observe([request] * TOKENS)
            self._running.append(request)

    def goes_on(self, chosen: list[int]) -> None:
        """Let time pass from one decision to the next."""
        for request in self._running[: len(chosen)]:
            self.admission.leave(request)
        del self._running[: len(chosen)]
        self._join(chosen)
        self._arrive(len(chosen))
        self._observe(self._running)


@pytest.mark.parametrize("waiting", [64, 256])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in BATCHERS if name != CONTROL])
def test_a_decision(benchmark: Benchmark, name: str, shape: str, waiting: int) -> None:
    layers, experts, top_k = SHAPES[shape]
    crowd = Crowd(name, layers, experts, top_k, waiting)
    resident = (np.random.default_rng(1).random(layers * experts) < 0.5).astype(np.float32)
    chosen: list[int] = []

    def decide() -> None:
        chosen[:] = crowd.admission.propose(ROOM, resident=resident)

    benchmark.pedantic(decide, setup=lambda: crowd.goes_on(chosen), rounds=ROUNDS, warmup_rounds=1)
    assert crowd.admission.stats.failures == 0
    assert len(set(chosen)) == ROOM
