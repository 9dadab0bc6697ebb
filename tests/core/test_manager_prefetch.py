"""Loading ahead: it may win time, but never take a slot that somebody needs, and never fail a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expertier.storage import PAGE
from support.fake_engine import FakeEngine, LayerShape, Worker, fake_engine, uniform, until

pytestmark = pytest.mark.timeout(60)

SHAPES = uniform(3, 8)
SLOT = SHAPES[0].slot_bytes


def in_use(engine: FakeEngine, layer: int, *experts: int) -> bool:
    return bool(engine.manager.resident(layer)[list(experts)].all())


def loaded(engine: FakeEngine) -> None:
    """Wait until nothing is loading any more."""
    until(lambda: engine.manager.idle)


def test_a_prefetched_expert_is_a_ready_hit_and_counted_once(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 8 * SLOT) as engine:
        engine.manager.begin_step(1)
        assert engine.manager.prefetch(1, [3, 4], limit=4) == 2
        loaded(engine)
        engine.layer(1, [[3, 5]])
        engine.layer(1, [[3, 5]])
        stats = engine.manager.stats()
        assert (stats.prefetches, stats.prefetches_used) == (2, 1)
        assert (stats.decode.ready_hits, stats.decode.misses) == (3, 1)
        assert stats.prefetch_bytes_read > 0


def test_a_prefetch_under_way_when_needed_is_late_and_becomes_a_demand(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 8 * SLOT, io_threads=1) as engine:
        engine.file.hold()
        engine.manager.prefetch(1, [0], limit=8)
        engine.manager.prefetch(2, [1], limit=8)
        engine.file.await_held(1)
        lease = engine.manager.acquire(2, [1], wait=False)
        engine.file.let_all()
        lease.wait()
        engine.pool.verify(2, [1], 0)
        lease.release()
        loaded(engine)
        stats = engine.manager.stats()
        assert (stats.decode.late, stats.decode.misses, stats.prefetches_used) == (1, 0, 1)
        # One read had begun; after it come both of the promoted expert, then the rest of the other prefetch.
        layers = [layer_of(engine, offset) for offset, _ in engine.file.reads]
        assert layers == [1, 2, 2, 1]


def layer_of(engine: FakeEngine, offset: int) -> int:
    return max((start, layer) for (layer, _), start in engine.pool.offsets.items() if start // PAGE * PAGE <= offset)[1]


def test_demand_overtakes_a_prefetch_between_its_chunks(tmp_path: Path) -> None:
    shapes = uniform(2, 4, parts=(8 * PAGE,))
    with fake_engine(tmp_path, shapes, 4 * shapes[0].slot_bytes, io_threads=1, chunk_bytes=2 * PAGE) as engine:
        engine.file.hold()
        engine.manager.prefetch(1, [0], limit=8)
        engine.file.await_held(1)
        lease = engine.manager.acquire(0, [2], wait=False)
        engine.file.let_all()
        lease.wait()
        lease.release()
        loaded(engine)
        layers = [layer_of(engine, offset) for offset, _ in engine.file.reads]
        chunks = layers.count(0)
        assert layers == [1] + [0] * chunks + [1] * (len(layers) - chunks - 1)


def test_a_prefetch_takes_free_room_but_never_a_pinned_or_a_named_expert(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.layer(1, [[6]], observe=False)
        with engine.manager.acquire(0, [0, 1]):
            assert engine.manager.prefetch(1, [6, 2, 3], [1.0, 1.0, 1.0], limit=8) == 1
            assert in_use(engine, 0, 0, 1)
            assert in_use(engine, 1, 6)
            assert engine.manager.stats().prefetches_declined == 1
        engine.check()


def test_a_prefetch_evicts_only_what_is_less_likely_to_be_used(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        for _ in range(40):
            engine.step({0: [[0, 1]]})
        engine.layer(0, [[2, 3]], observe=False)
        assert engine.manager.prefetch(1, [0, 1, 2, 3], [0.9, 0.5, 0.5, 0.5], limit=8) == 2
        loaded(engine)
        assert in_use(engine, 0, 0, 1)
        assert in_use(engine, 1, 0, 1)
        stats = engine.manager.stats()
        assert (stats.prefetches, stats.prefetches_declined, stats.evictions) == (2, 2, 2)


def test_several_small_victims_are_each_compared_with_the_one_expert_they_would_make_room_for(tmp_path: Path) -> None:
    shapes = {0: LayerShape(experts=4, top_k=1, parts=(PAGE,)), 1: LayerShape(experts=2, top_k=1, parts=(5 * PAGE,))}
    with fake_engine(tmp_path, shapes, 6 * PAGE) as engine:
        for _ in range(40):
            engine.step({0: [[0], [1]]})
        engine.layer(0, [2], observe=False)
        # The slot of expert 2, which nobody uses, is not enough; the other two are in constant use.
        assert engine.manager.prefetch(1, [0], [0.2], limit=1) == 0
        assert in_use(engine, 0, 0, 1, 2)
        stats = engine.manager.stats()
        assert (stats.evictions, stats.prefetches_declined) == (0, 1)


def test_the_limit_counts_loads_already_under_way(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 12 * SLOT) as engine:
        engine.file.hold()
        assert engine.manager.prefetch(1, [0, 1], limit=3) == 2
        assert engine.manager.prefetch(1, [0, 1, 2, 3], limit=3) == 1
        assert engine.manager.prefetch(2, [0], limit=3) == 0
        assert engine.manager.prefetch(2, [0], limit=0) == 0


def test_an_expert_named_twice_is_loaded_once(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        assert engine.manager.prefetch(1, [3, 3, 2, 3], [0.9, 0.8, 0.7, 0.6], limit=8) == 2
        loaded(engine)
        engine.step({1: [[2, 3]]})
        engine.check()


def test_the_slot_of_a_cancelled_prefetch_is_used_again_and_never_computed_on(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 2 * SLOT, io_threads=1) as engine:
        engine.manager.begin_step(1)
        engine.file.hold()
        assert engine.manager.prefetch(1, [0, 1], limit=2) == 2
        engine.file.await_held(1)
        worker = Worker(engine.layer, 1, [[2, 3]])
        until(lambda: engine.manager.stats().prefetches_cancelled == 2)
        engine.file.let_all()
        worker.join()
        assert not engine.manager.resident(1)[:2].any()
        assert engine.pool.handed_over == 2
        engine.layer(1, [[0, 1]])
        stats = engine.manager.stats()
        assert (stats.decode.misses, stats.decode.late, stats.prefetches_used) == (4, 0, 0)
        engine.check()


def test_a_prefetch_given_up_in_mid_read_is_loaded_anew_when_it_is_needed_after_all(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT, io_threads=1) as engine:
        engine.manager.begin_step(1)
        engine.file.hold()
        engine.manager.prefetch(1, [5], limit=2)
        engine.file.await_held(1)
        engine.manager.end_step()
        worker = Worker(engine.layer, 1, [[5]])
        until(lambda: engine.manager._leases == 1)
        engine.file.let_all()
        worker.join()
        stats = engine.manager.stats()
        assert (stats.prefetches_cancelled, stats.prefetches_used, stats.decode.misses) == (1, 0, 1)
        engine.check()


def test_room_from_prefetches_that_were_only_queued_is_found_at_once(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT, io_threads=1) as engine:
        engine.file.hold()
        lease = engine.manager.acquire(0, [0], wait=False)
        engine.file.await_held(1)
        assert engine.manager.prefetch(1, [0, 1, 2], limit=4) == 3
        # The only I/O thread is busy with layer 0; this must not wait for it.
        others = Worker(lambda: engine.manager.acquire(2, [4, 5, 6], wait=False).release())
        others.join()
        engine.file.let_all()
        lease.wait()
        lease.release()
        engine.check()


def test_a_step_right_behind_a_prefetch_that_filled_the_memory_finds_room(tmp_path: Path) -> None:
    for _ in range(20):  # mostly before an I/O thread has taken up the prefetch
        with fake_engine(tmp_path, SHAPES, 4 * SLOT, io_threads=1) as engine:
            engine.manager.prefetch(1, [0, 1, 2, 3], limit=4)
            engine.layer(0, [[0, 1], [2, 3]])
            engine.check()


@pytest.mark.parametrize("needed", [[0, 1], [0, 5]], ids=["all it needs is there", "something is missing"])
def test_the_router_gives_up_prefetches_of_its_layer_that_it_does_not_want(tmp_path: Path, needed: list[int]) -> None:
    with fake_engine(tmp_path, SHAPES, 8 * SLOT, io_threads=1) as engine:
        engine.step({1: [[0, 1]]})
        engine.file.hold()
        engine.manager.prefetch(1, [2, 3], limit=4)
        engine.manager.prefetch(2, [2], limit=4)
        engine.manager.acquire(1, [needed], wait=False).release()
        assert engine.manager.stats().prefetches_cancelled == 2, "the one for another layer goes on"


def test_the_end_of_a_step_gives_up_what_was_not_used(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT, io_threads=1) as engine:
        engine.manager.begin_step(1)
        engine.file.hold()
        engine.manager.prefetch(2, [2, 3], limit=4)
        engine.manager.end_step()
        engine.file.let_all()
        loaded(engine)
        assert engine.manager.stats().prefetches_cancelled == 2
        assert not engine.manager.resident(2).any()
        engine.step({2: [[2, 3]]})
        engine.check()


def test_a_demand_load_given_up_is_not_counted_as_a_prefetch(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT, io_threads=1) as engine:
        engine.manager.begin_step(1)
        engine.file.hold()
        engine.manager.acquire(0, [0, 1], wait=False).release()
        engine.manager.end_step()
        engine.file.let_all()
        loaded(engine)
        stats = engine.manager.stats()
        assert (stats.prefetches, stats.prefetches_cancelled) == (0, 0)


def test_nothing_is_loaded_ahead_while_somebody_waits_for_room(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        small, large = engine.manager.acquire(0, [0]), engine.manager.acquire(0, [1, 2])
        waiting = Worker(engine.layer, 1, [[0, 1, 2]])
        until(lambda: engine.manager._tight)
        small.release()
        assert engine.manager.prefetch(2, [0, 1], [1.0, 1.0], limit=4) == 0 or not waiting.running
        large.release()
        waiting.join()
        engine.check()


def test_prefetching_while_the_budget_shrinks_begins_nothing(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT) as engine:
        lease = engine.manager.acquire(0, [0, 1, 2, 3, 4])
        shrinking = Worker(engine.resize, 3 * SLOT)
        until(lambda: engine.manager._tight)
        for experts in ([0], [0, 1], [0, 1, 2], list(range(8))):
            assert engine.manager.prefetch(1, experts, [1.0] * len(experts), limit=8) == 0
        lease.release()
        shrinking.join()
        assert engine.manager.prefetch(1, [0], limit=1) == 1
        loaded(engine)
        engine.check()


def test_a_prefetch_respects_the_quota_of_its_layer(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 8 * SLOT, quotas={1: 3 * SLOT}) as engine:
        engine.step({0: [[0, 1]], 1: [[6, 7]]})
        for _ in range(30):
            engine.manager.begin_step(1)
            engine.manager.observe(1, [[6, 7]])
        assert engine.manager.prefetch(1, [0, 1, 2], [0.5, 0.5, 0.5], limit=8) == 1
        loaded(engine)
        assert in_use(engine, 1, 0, 6, 7)
        engine.check()


def test_in_a_step_of_many_tokens_layers_still_to_come_keep_theirs(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT) as engine:
        engine.step({2: [[0, 1]]})
        engine.manager.begin_step(4, "prefill")
        engine.layer(0, [[0, 1], [2, 3], [0, 1], [2, 3]])
        # Four slots of the finished layer 0 may go, the two of layer 2 may not.
        assert engine.manager.prefetch(1, np.arange(8), limit=8) == 4
        loaded(engine)
        assert in_use(engine, 2, 0, 1)
        assert in_use(engine, 1, 0, 1, 2, 3)
        engine.check()


def test_every_prefetch_has_exactly_one_end(tmp_path: Path) -> None:
    """Used, given up, or evicted unused; the rest is still waiting for its use."""
    dice = np.random.default_rng(7)
    with fake_engine(tmp_path, SHAPES, 5 * SLOT) as engine:
        for _ in range(150):
            engine.manager.begin_step(1)
            for layer in SHAPES:
                engine.layer(layer, [dice.permutation(8)[:2]])
                engine.manager.prefetch(min(layer + 1, 2), dice.permutation(8)[:3], dice.random(3), limit=3)
            engine.manager.end_step()
            stats = engine.manager.stats()
            waiting = int(engine.manager._table.ahead.sum())
            assert stats.prefetches_used + stats.prefetches_cancelled + waiting <= stats.prefetches
        assert stats.prefetches_used > 0
        assert stats.prefetches_cancelled > 0
        engine.check()
