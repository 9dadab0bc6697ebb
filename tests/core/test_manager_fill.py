"""Free room fills itself in the background: it evicts nothing, fails no step, and waits while a prompt streams."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fake_engine import FakeEngine, fake_engine, uniform, until

pytestmark = pytest.mark.timeout(60)

SHAPES = uniform(3, 8)
SLOT = SHAPES[0].slot_bytes
EVERYTHING = 24


def settled(engine: FakeEngine, experts: int) -> None:
    """Wait until so many experts are resident and nothing loads."""
    until(lambda: engine.manager.idle and engine.manager.stats().resident_experts == experts)


def test_everything_is_loaded_from_the_start_when_it_fits(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, EVERYTHING * SLOT, fill=True) as engine:
        engine.manager.warm_up()
        settled(engine, EVERYTHING)
        engine.step({layer: [[0, 7]] for layer in SHAPES})
        stats = engine.manager.stats()
        assert (stats.decode.ready_hits, stats.decode.misses, stats.evictions) == (6, 0, 0)


def test_who_waits_for_the_fill_finds_everything_resident(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, EVERYTHING * SLOT, fill=True) as engine:
        engine.manager.wait_until_filled()  # nothing has begun
        assert not engine.manager.complete
        engine.manager.warm_up()
        engine.manager.wait_until_filled()
        assert engine.manager.complete


def test_nothing_is_filled_unless_asked_for(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, EVERYTHING * SLOT) as engine:
        engine.manager.warm_up()
        engine.step({0: [[1, 2]]})
        assert engine.manager.stats().resident_experts == 2


def test_a_bounded_budget_is_filled_while_tokens_are_decoded_and_not_before(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 10 * SLOT, fill=True) as engine:
        engine.manager.warm_up()
        engine.step({0: [[0, 1]] * 4}, phase="prefill")
        assert engine.manager.stats().resident_experts == 2
        engine.step({0: [[0, 1]]})
        settled(engine, 10)
        assert engine.manager.stats().evictions == 0


def test_experts_used_before_come_first(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, fill=True) as engine:
        for _ in range(3):
            engine.step({2: [[6, 7]]}, phase="prefill")
        engine.step({1: [[0, 1]], 0: [[0, 1]]}, phase="prefill")
        engine.resize(2 * SLOT)
        engine.resize(6 * SLOT)
        engine.step({0: [[0, 1]]})
        settled(engine, 6)
        assert engine.manager.resident(2)[[6, 7]].all()


def test_a_step_takes_the_room_back_from_loads_that_only_fill(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT, fill=True, io_threads=1) as engine:
        engine.manager.begin_step(1)
        engine.layer(1, [[4, 5]])
        engine.layer(2, [[0, 1]])
        engine.layer(0, [[6, 7]])
        assert engine.manager.stats().peak_resident_bytes <= 4 * SLOT


def test_a_fill_that_cannot_be_read_fails_no_step(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, EVERYTHING * SLOT, fill=True) as engine:
        engine.file.fail(0, 1 << 40)
        engine.manager.warm_up()
        engine.manager.wait_until_filled()
        assert engine.manager.stats().resident_experts == 0
        engine.file.heal()
        engine.step({layer: [[2, 3]] for layer in SHAPES})
        assert engine.manager.stats().decode.requests == 6
