"""Resizing while the engine runs, and closing at any moment."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from expertier.errors import BudgetError, ExpertLoadError, ManagerClosedError
from support.fake_engine import Worker, fake_engine, uniform, until

pytestmark = pytest.mark.timeout(60)

SHAPES = uniform(3, 8)
SLOT = SHAPES[0].slot_bytes


def test_a_smaller_budget_holds_when_resize_returns_and_a_larger_one_is_used(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 8 * SLOT) as engine:
        engine.step({0: [[0, 1], [2, 3]], 1: [[0, 1], [2, 3]]})
        engine.resize(3 * SLOT)
        assert engine.pool.backed == 3 * SLOT
        assert engine.manager.stats().evictions == 5
        engine.step({0: [[0, 1]]})
        engine.check()
        engine.resize(10 * SLOT)
        engine.step({0: [[0, 1], [2, 3]], 1: [[0, 1], [2, 3]]})
        assert engine.pool.backed == 8 * SLOT
        engine.check()
        assert engine.manager.stats().budget_bytes == engine.manager.budget == 10 * SLOT


def test_resize_evicts_by_the_policy(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, policy="lru") as engine:
        for expert in range(6):
            engine.step({1: [[expert]]})
        engine.resize(2 * SLOT)
        assert engine.manager.resident(1).nonzero()[0].tolist() == [4, 5]


def test_a_budget_below_one_token_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT) as engine:
        engine.step({0: [[0, 1]]})
        with pytest.raises(BudgetError, match="one token needs"):
            engine.manager.resize(2 * SLOT - 1)
        assert engine.manager.budget == 6 * SLOT
        assert engine.manager.resident(0)[:2].all()


def test_resize_waits_for_what_a_lease_pins(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT) as engine:
        engine.step({1: [[0, 1]]})
        lease = engine.manager.acquire(0, [0, 1, 2, 3])
        shrinking = Worker(engine.resize, 2 * SLOT)
        until(lambda: engine.manager._tight)
        until(lambda: engine.pool.backed == 4 * SLOT)
        assert shrinking.running
        with engine.pool.computing(0, [0, 1, 2, 3]):
            engine.pool.verify(0, [0, 1, 2, 3], 0)
        lease.release()
        shrinking.join()
        engine.check()


def test_a_resize_below_what_the_running_step_may_need_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 8 * SLOT) as engine:
        engine.manager.begin_step(3, "prefill")
        lease = engine.manager.acquire(0, [0, 1, 2])
        with pytest.raises(BudgetError, match="running step may need") as caught:
            engine.manager.resize(5 * SLOT)  # its three tokens may choose six experts
        assert "when the step has ended" in caught.value.remedy
        assert engine.manager.budget == 8 * SLOT and engine.manager.resident(0)[:3].all()
        lease.release()
        engine.resize(6 * SLOT)  # what they may choose fits
        with engine.manager.acquire(1, range(6)):
            pass
        engine.manager.end_step()
        engine.resize(2 * SLOT)
        engine.check()


def test_resize_gives_up_prefetches_of_all_kinds(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, io_threads=1) as engine:
        engine.file.hold()
        engine.manager.prefetch(1, range(6), limit=6)
        engine.file.await_held(1)
        shrinking = Worker(engine.resize, 2 * SLOT)
        until(lambda: engine.pool.backed == 2 * SLOT)
        shrinking.join()  # the one read in flight fits the new budget and is not waited for
        engine.file.let_all()
        engine.step({0: [[0, 1]]})
        engine.check()


def test_resize_beside_a_failed_expert_that_is_still_pinned_ends_when_it_is_released(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT) as engine:
        lease = engine.manager.acquire(1, [0, 1, 2], wait=False)
        lease.wait()
        offset, size = engine.pool.place_of(0, 4, 0)
        engine.file.fail(offset + size // 2, 1)
        failed = engine.manager.acquire(0, [4], wait=False)
        until(lambda: failed.ready(1))
        shrinking = Worker(engine.resize, 3 * SLOT)
        until(lambda: engine.manager._tight)
        with pytest.raises(ExpertLoadError):
            failed.wait()
        failed.release()
        shrinking.join()
        lease.release()
        engine.check()


def test_resize_keeps_quotas(tmp_path: Path) -> None:
    quotas = {0: 4 * SLOT}
    with fake_engine(tmp_path, SHAPES, 10 * SLOT, quotas=quotas) as engine:
        engine.step({0: [[0, 1], [2, 3]], 1: [[0, 1], [2, 3]]})
        lease = engine.manager.acquire(0, [0, 1])
        engine.resize(3 * SLOT)
        lease.release()
        engine.step({0: [[4, 5], [5, 6]]})
        with pytest.raises(BudgetError):
            engine.manager.acquire(0, range(4))
        engine.resize(12 * SLOT)
        engine.step({0: [[4, 5], [6, 7]]})
        engine.step({0: [[0, 1], [2, 3]]})
        assert engine.manager.resident(0).sum() == 4
        engine.check()


def test_close_wakes_whoever_waits_for_a_load(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT) as engine:
        engine.file.hold()
        workers = [Worker(engine.layer, 0, [[0, 1]]), Worker(engine.layer, 1, [[0, 1]])]
        until(lambda: engine.manager._leases == 2)
        closing = Worker(engine.manager.close)
        for worker in workers:
            with pytest.raises(ManagerClosedError):
                worker.join()
        engine.file.let_all()
        closing.join()
        assert engine.pool.closed


def test_close_wakes_whoever_waits_for_room_and_whoever_waits_behind_them(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        lease = engine.manager.acquire(0, [0, 1, 2])
        workers = [
            Worker(engine.layer, 1, [[0, 1]]),
            Worker(engine.layer, 2, [[0, 1]]),
            Worker(engine.resize, 3 * SLOT),
        ]
        until(lambda: engine.manager._tight)
        engine.manager.close()
        for worker in workers:
            with pytest.raises(ManagerClosedError):
                worker.join()
        lease.release()


def test_close_wakes_a_resize(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        lease = engine.manager.acquire(0, [0, 1, 2])
        shrinking = Worker(engine.resize, 2 * SLOT)
        until(lambda: engine.manager._tight)
        engine.manager.close()
        with pytest.raises(ManagerClosedError):
            shrinking.join()
        lease.release()


def test_a_closed_manager_refuses_everything_but_closing_releasing_and_counting(tmp_path: Path) -> None:
    before = threading.active_count()
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        manager = engine.manager
        lease = manager.acquire(0, [0, 1])
        manager.prefetch(1, [0, 1], limit=2)
        manager.close()
        manager.close()
        lease.release()
        assert manager.stats().decode.misses == 2
        for refused in (
            manager.begin_step,
            lambda: manager.acquire(0, [0]),
            lambda: manager.acquire(0, [5]),
            lambda: manager.prefetch(0, [0], limit=1),
            lambda: manager.resize(3 * SLOT),
        ):
            with pytest.raises(ManagerClosedError, match="Load the model again"):
                refused()
    assert threading.active_count() == before
