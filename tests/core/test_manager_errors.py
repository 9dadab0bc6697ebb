"""What goes wrong reaches whoever needed it, once, and harms nobody else."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from expertier.errors import ExpertLoadError
from support.fake_engine import FakeEngine, Worker, fake_engine, uniform, until

pytestmark = pytest.mark.timeout(60)

SHAPES = uniform(3, 8)
SLOT = SHAPES[0].slot_bytes


def break_expert(engine: FakeEngine, layer: int, expert: int, stage: int = 0, times: int = 1 << 30) -> None:
    # Well inside, because reads of neighbours begin on page boundaries.
    offset, size = engine.pool.place_of(layer, expert, stage)
    engine.file.fail(offset + size // 2, 1, times)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_failing_read_names_layer_expert_and_cause_and_the_next_attempt_succeeds(tmp_path: Path, stage: int) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        break_expert(engine, 1, 6, stage)
        with pytest.raises(
            ExpertLoadError, match=r"Expert 6 of layer 1 .*model\.bin at offset .*Input/output"
        ) as caught:
            engine.layer(1, [[2, 6]])
        assert isinstance(caught.value.__cause__, ExpertLoadError)
        assert not engine.manager.resident(1)[6]
        engine.file.heal()
        engine.layer(1, [[2, 6]])
        engine.check()


def test_a_failed_read_is_raised_by_the_wait_and_not_before(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        break_expert(engine, 0, 3)
        lease = engine.manager.acquire(0, [3], wait=False)
        until(lambda: lease.ready(1))
        for stage in (0, 1, None):
            with pytest.raises(ExpertLoadError, match="Expert 3 of layer 0"):
                lease.wait(stage)
        lease.release()


def test_a_file_that_became_shorter_is_reported_and_works_again_when_restored(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        path = engine.file.path
        whole = path.read_bytes()
        offset, size = engine.pool.place_of(2, 7, 1)
        os.truncate(path, offset + size // 2)
        with pytest.raises(ExpertLoadError, match=rf"Expert 7 of layer 2 .*ended at {offset + size // 2}, .*truncated"):
            engine.layer(2, [[7]])
        engine.layer(2, [[0, 1]])
        path.write_bytes(whole)
        engine.layer(2, [[7]])
        engine.check()


def test_short_reads_are_no_errors(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT, io_mode="buffered") as engine:
        engine.file.most_bytes = 1000
        engine.step({0: [[0, 1]], 1: [[2, 3]]})
        engine.check()


def test_a_retry_does_not_meet_the_old_error_while_the_experts_other_reads_are_under_way(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT, io_threads=2) as engine:
        break_expert(engine, 0, 4, stage=0, times=1)
        engine.file.hold()
        first = Worker(engine.layer, 0, [[4]])
        engine.file.await_held(2)
        engine.file.hold(*engine.pool.place_of(0, 4, 1))
        with pytest.raises(ExpertLoadError):
            first.join()
        retry = Worker(engine.layer, 0, [[4]])
        until(lambda: engine.manager._leases == 1)
        engine.file.let_all()
        retry.join()
        engine.check()


def test_everybody_who_waits_for_the_same_expert_hears_of_its_error(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        break_expert(engine, 0, 4)
        engine.file.hold()
        workers = [Worker(engine.layer, 0, [[4, expert]]) for expert in (1, 2)]
        until(lambda: engine.manager._leases == 2)
        engine.file.let_all()
        for worker in workers:
            with pytest.raises(ExpertLoadError, match="Expert 4 of layer 0"):
                worker.join()
        assert engine.manager._leases == 0
        engine.file.heal()
        engine.layer(0, [[4, 1, 2]])
        engine.check()


def test_a_failed_prefetch_fails_no_step_that_does_not_need_the_expert(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        break_expert(engine, 1, 5, times=1)
        engine.manager.begin_step(1)
        assert engine.manager.prefetch(1, [5], limit=2) == 1
        until(lambda: engine.manager.idle)
        engine.layer(0, [[0, 1]])
        engine.layer(1, [[0, 1]])
        engine.layer(1, [[5]])
        stats = engine.manager.stats()
        assert (stats.prefetches_used, stats.decode.late) == (0, 0), "what failed was of no use"
        assert stats.decode.misses == 5
        engine.check()


def test_the_error_of_one_expert_makes_no_other_look_ready(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        break_expert(engine, 1, 5)
        engine.manager.prefetch(1, [5], limit=1)
        until(lambda: engine.manager.idle)
        engine.file.hold()
        lease = engine.manager.acquire(0, [0], wait=False)
        assert not lease.ready(0)
        engine.file.let_all()
        lease.wait()
        lease.release()


def test_the_slot_of_a_failed_expert_is_used_again(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 2 * SLOT) as engine:
        for _ in range(5):
            break_expert(engine, 0, 4)
            with pytest.raises(ExpertLoadError):
                engine.layer(0, [[4, 0]])
            engine.check()
            engine.layer(1, [[1, 2]])
            engine.check()
            engine.file.heal()
            engine.layer(0, [[4, 0]])
            engine.layer(2, [[1, 2]])


def test_what_fails_while_its_caller_waits_for_room_is_raised_and_not_read_over_and_over(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        break_expert(engine, 1, 0)
        lease = engine.manager.acquire(0, [0, 1, 2])
        with pytest.raises(ExpertLoadError, match="Expert 0 of layer 1"):
            engine.layer(1, [[0, 1]])
        lease.release()
        engine.file.heal()
        engine.layer(1, [[0, 1]])
        engine.check()


@pytest.mark.parametrize("full", [False, True], ids=["with free room", "with a recycled slot"])
def test_memory_that_cannot_be_had_fails_the_step_and_what_had_begun_is_still_loaded(
    tmp_path: Path, full: bool
) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        if full:
            engine.step({2: [[0, 1], [2, 3]]})
        engine.pool.refuse.add((0, 5))
        with pytest.raises(ExpertLoadError, match="No memory mapping for expert 5 of layer 0"):
            engine.layer(0, [[3, 5]])
        engine.layer(0, [[3]])
        engine.check()
        engine.pool.refuse.clear()
        engine.layer(0, [[3, 5]])
        engine.check()


def test_memory_that_cannot_be_had_for_a_prefetch_is_logged_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.pool.refuse.add((1, 5))
        with caplog.at_level(logging.WARNING, "expertier"):
            assert engine.manager.prefetch(1, [4, 5, 6], limit=4) == 1
        assert "No memory mapping for expert 5 of layer 1" in caplog.text
        engine.layer(1, [[4, 6]])
        with pytest.raises(ExpertLoadError, match="No memory mapping"):
            engine.layer(1, [[4, 5]])
        engine.check()


def test_a_retry_into_its_own_slot_that_fails_gives_the_slot_back(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        break_expert(engine, 0, 4)
        with pytest.raises(ExpertLoadError):
            engine.layer(0, [[4]])
        engine.pool.refuse.add((0, 4))
        with pytest.raises(ExpertLoadError, match="No memory mapping"):
            engine.layer(0, [[4]])
        engine.check()


def test_after_any_number_of_failures_nothing_is_pinned_and_no_byte_is_lost(tmp_path: Path) -> None:
    dice = np.random.default_rng(2)
    failures = 0
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        for _ in range(60):
            engine.file.heal()
            break_expert(engine, int(dice.integers(3)), int(dice.integers(8)), int(dice.integers(2)), times=1)
            engine.manager.begin_step(1)
            for layer in SHAPES:
                try:
                    engine.layer(layer, [dice.permutation(8)[:3]])
                except ExpertLoadError:
                    failures += 1
                engine.manager.prefetch(layer, dice.permutation(8)[:2], limit=2)
            engine.manager.end_step()
            assert engine.manager._leases == 0
            assert not engine.manager._table.pins.any()
            engine.check()
        assert failures > 3
        engine.file.heal()
        engine.layer(0, [[0, 1], [2, 3]])
