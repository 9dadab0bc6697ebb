"""What the manager costs when it has nothing to load: the price of every layer of every token.

    python -m pytest examples/benchmarks/bench_manager.py

The experts are never touched, so that only bookkeeping is measured: 48 layers of 128 experts, 8 per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from expertier.manager import ManagerConfig, OffloadManager
from expertier.residency.pool import PlannedRead

LAYERS, EXPERTS, TOP_K = 48, 128, 8
Benchmark = Callable[..., Any]


class NoMemory:
    """A pool whose experts are there without reads and without memory."""

    def slot_bytes(self, layer: int) -> int:
        return 1

    def stages(self, layer: int) -> int:
        return 3

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        return ()

    def drop(self, layer: int, expert: int) -> None:
        """There is nothing to give back."""

    def close(self) -> None:
        """There is nothing to release."""


def make_manager(policy: str, budget: int) -> OffloadManager:
    layers = range(LAYERS)
    return OffloadManager(
        experts=dict.fromkeys(layers, EXPERTS),
        top_k=dict.fromkeys(layers, TOP_K),
        pool=NoMemory(),
        budget=budget,
        config=ManagerConfig(policy=policy, io_threads=1),
    )


@pytest.fixture(params=["lfu", "lru"])
def resident(request: pytest.FixtureRequest) -> Iterator[OffloadManager]:
    """Yield a manager with every expert in memory."""
    manager = make_manager(request.param, LAYERS * EXPERTS)
    for layer in range(LAYERS):
        manager.acquire(layer, range(EXPERTS)).release()
    yield manager
    manager.close()


def routes(tokens: int) -> np.ndarray[Any, Any]:
    dice = np.random.default_rng(0)
    return np.stack([dice.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])


@pytest.mark.parametrize("tokens", [1, 512])
def test_observe_acquire_and_release_of_a_resident_layer(
    benchmark: Benchmark, resident: OffloadManager, tokens: int
) -> None:
    chosen = routes(tokens)
    resident.begin_step(tokens)

    def layer() -> None:
        resident.observe(7, chosen)
        lease = resident.acquire(7, chosen, wait=False)
        lease.wait(0)
        lease.release()

    benchmark(layer)


def test_a_decode_step_over_all_resident_layers(benchmark: Benchmark, resident: OffloadManager) -> None:
    chosen = routes(1)

    def step() -> None:
        resident.begin_step(1)
        for layer in range(LAYERS):
            resident.observe(layer, chosen)
            with resident.acquire(layer, chosen, wait=False) as lease:
                lease.wait(0)
        resident.end_step()

    benchmark(step)


@pytest.mark.parametrize("policy", ["lfu", "lru", "lfru", "edge"])
def test_a_layer_that_misses_most_of_its_experts(benchmark: Benchmark, policy: str) -> None:
    manager = make_manager(policy, LAYERS * EXPERTS // 4)
    dice = np.random.default_rng(0)
    turn = iter(range(1 << 40))

    def layer() -> None:
        chosen = dice.permutation(EXPERTS)[None, :TOP_K]
        with manager.acquire(next(turn) % LAYERS, chosen):
            pass

    for _ in range(10 * LAYERS):
        layer()
    benchmark(layer)
    manager.close()
