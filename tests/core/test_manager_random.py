"""Anything in any order: random sequences, alone and in many threads, must end and must never break a promise."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from expertier.errors import BudgetError, ExpertLoadError, ManagerClosedError
from expertier.manager import Lease
from expertier.storage import PAGE
from support.fake_engine import FakeEngine, LayerShape, Worker, fake_engine, uniform, until

pytestmark = pytest.mark.timeout(120)

MIXED = {
    1: LayerShape(experts=6, top_k=2, parts=(PAGE, PAGE)),
    2: LayerShape(experts=9, top_k=3, parts=(PAGE, PAGE)),
    4: LayerShape(experts=4, top_k=1, parts=(5 * PAGE + 8, 2 * PAGE, 24)),
    5: LayerShape(experts=5, top_k=2, parts=(3 * PAGE,)),
}
SMALLEST = max(shape.top_k * shape.slot_bytes for shape in MIXED.values())
LARGEST = sum(shape.experts * shape.slot_bytes for shape in MIXED.values())
LAYERS = st.sampled_from(sorted(MIXED))
EXPERTS = st.lists(st.integers(0, 8), min_size=1, max_size=5)
BUDGETS = st.integers(SMALLEST, LARGEST)


def within(layer: int, experts: list[int]) -> list[int]:
    return sorted({expert % MIXED[layer].experts for expert in experts})


class RandomUse(RuleBasedStateMachine):
    """One engine thread that does anything it may, on a disk that fails now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.broken = False

    @initialize(
        budget=BUDGETS,
        policy=st.sampled_from(["lru", "lfu", "lfru", "edge", "predictive"]),
        threads=st.integers(1, 3),
        quota=st.booleans(),
    )
    def start(self, budget: int, policy: str, threads: int, quota: bool) -> None:
        quotas = {2: 4 * MIXED[2].slot_bytes, 5: 2 * MIXED[5].slot_bytes} if quota else None
        self.context = fake_engine(
            Path(self.directory.name),
            MIXED,
            budget,
            policy=policy,
            io_threads=threads,
            quotas=quotas,
            chunk_bytes=2 * PAGE,
        )
        self.engine: FakeEngine = self.context.__enter__()
        self.engine.manager.begin_step(1)

    @rule(tokens=st.integers(1, 9))
    def begin(self, tokens: int) -> None:
        self.engine.manager.begin_step(tokens, "decode" if tokens == 1 else "prefill")

    @rule()
    def end(self) -> None:
        self.engine.manager.end_step()

    @rule(layer=LAYERS, experts=EXPERTS, stagewise=st.booleans())
    def compute(self, layer: int, experts: list[int], stagewise: bool) -> None:
        try:
            self.engine.layer(layer, [[expert] for expert in within(layer, experts)], stagewise=stagewise)
        except BudgetError:
            needed = len(within(layer, experts)) * MIXED[layer].slot_bytes
            assert needed > self.engine.manager._table.limit(layer)
        except ExpertLoadError:
            assert self.broken

    @rule(layer=LAYERS, experts=EXPERTS)
    def abandon(self, layer: int, experts: list[int]) -> None:
        """A step that ends before its loads do."""
        try:
            lease: Lease = self.engine.manager.acquire(layer, within(layer, experts), wait=False)
        except BudgetError:
            return
        except ExpertLoadError:
            assert self.broken
            return
        lease.release()

    @rule(layer=LAYERS, experts=EXPERTS, chance=st.floats(0, 1), limit=st.integers(0, 5))
    def prefetch(self, layer: int, experts: list[int], chance: float, limit: int) -> None:
        candidates = [expert % MIXED[layer].experts for expert in experts]
        begun = self.engine.manager.prefetch(layer, candidates, [chance] * len(candidates), limit=limit)
        assert 0 <= begun <= limit

    @rule(budget=BUDGETS)
    def resize(self, budget: int) -> None:
        before = self.engine.manager.budget
        try:
            self.engine.resize(budget)
        except BudgetError:
            assert budget < self.engine.manager._step_needs <= before == self.engine.manager.budget

    @rule(layer=LAYERS, expert=st.integers(0, 8), times=st.integers(1, 3))
    def break_disk(self, layer: int, expert: int, times: int) -> None:
        offset, size = self.engine.pool.place_of(layer, expert % MIXED[layer].experts, 0)
        self.engine.file.fail(offset + size // 2, 1, times)
        self.broken = True

    @rule()
    def heal_disk(self) -> None:
        self.engine.file.heal()
        # A load begun before may still report the old error, and does so to whoever needs it.
        self.engine.manager.end_step()
        self.broken = any(self.engine.manager._loads._requests)

    @invariant()
    def promises_hold(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()
            manager = self.engine.manager
            assert manager._leases == 0
            assert not manager._table.pins.any()
            stats = manager.stats()
            assert stats.prefetches_used + stats.prefetches_cancelled <= stats.prefetches
            for layer in MIXED:
                held = sum(len(slot) for (owner, _), slot in self.engine.pool.memory.items() if owner == layer)
                assert held == manager._table.layer_bytes[layer]

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.context.__exit__(None, None, None)
        self.directory.cleanup()


RandomUse.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestRandomUse = RandomUse.TestCase


@pytest.mark.parametrize("seed", range(6))
def test_many_threads_that_load_prefetch_resize_and_fail_all_come_to_an_end(tmp_path: Path, seed: int) -> None:
    shapes = MIXED if seed % 2 else uniform(4, 8)
    smallest = max(shape.top_k * shape.slot_bytes for shape in shapes.values())
    dice = np.random.default_rng(seed)
    budget = 3 * smallest
    with fake_engine(tmp_path, shapes, 4 * smallest, policy=["lfu", "lru"][seed % 2], chunk_bytes=2 * PAGE) as engine:
        stop = threading.Event()
        engine.resize(budget)
        engine.pool.allowed = 4 * smallest
        failing = seed >= 4
        done = np.zeros(3, int)

        def compute(number: int) -> None:
            own = np.random.default_rng((seed, number))
            for _ in range(120):
                engine.manager.begin_step(1)
                for layer, shape in shapes.items():
                    wanted = own.permutation(shape.experts)[: shape.top_k]
                    try:
                        engine.layer(layer, [wanted], stagewise=bool(own.integers(2)))
                        done[number] += 1
                    except ExpertLoadError:
                        assert failing
                engine.manager.end_step()

        def load_ahead() -> None:
            own = np.random.default_rng((seed, 10))
            while not stop.wait(0.0005):
                layer = int(own.choice(sorted(shapes)))
                engine.manager.prefetch(layer, own.permutation(shapes[layer].experts)[:3], own.random(3), limit=4)

        def resize() -> None:
            own = np.random.default_rng((seed, 11))
            while not stop.wait(0.002):
                engine.manager.resize(int(own.integers(smallest, 4 * smallest)))

        def disturb() -> None:
            own = np.random.default_rng((seed, 12))
            while failing and not stop.wait(0.005):
                layer = int(own.choice(sorted(shapes)))
                offset, size = engine.pool.place_of(layer, int(own.integers(shapes[layer].experts)), 0)
                engine.file.fail(offset + size // 2, 1, 1)

        computing = [Worker(compute, number) for number in range(3)]
        others = [Worker(load_ahead), Worker(resize), Worker(disturb)]
        try:
            for worker in computing:
                worker.join()
        finally:
            stop.set()
        for worker in others:
            worker.join()
        engine.file.heal()
        engine.check()
        assert engine.manager._leases == 0
        assert not engine.manager._table.pins.any()
        assert failing or (done == 120 * len(shapes)).all()
        layer = int(dice.choice(sorted(shapes)))
        engine.layer(layer, [list(range(shapes[layer].top_k))])


@pytest.mark.parametrize("moment", range(8))
def test_closing_in_the_middle_of_everything_ends_all_threads(tmp_path: Path, moment: int) -> None:
    shapes = uniform(3, 8)
    with fake_engine(tmp_path, shapes, 6 * shapes[0].slot_bytes) as engine:

        def compute(number: int) -> None:
            own = np.random.default_rng((moment, number))
            while True:
                layer = int(own.integers(3))
                # Not computed on: the memory is gone as soon as the manager is closed.
                with engine.manager.acquire(layer, own.permutation(8)[:2]):
                    engine.manager.prefetch((layer + 1) % 3, own.permutation(8)[:2], limit=2)

        workers = [Worker(compute, number) for number in range(3)]
        until(lambda: engine.manager.stats().decode.misses >= 20 * moment)
        engine.manager.close()
        for worker in workers:
            with pytest.raises(ManagerClosedError):
                worker.join()
