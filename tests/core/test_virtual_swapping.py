"""Background swaps, and the experts that every layer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.errors import BudgetError
from expertier.residency.floor import spare_every_layer
from expertier.virtual.importance import Importance
from expertier.virtual.swapping import Swapper
from support.fake_engine import FakeEngine, fake_engine, uniform, until

pytestmark = pytest.mark.timeout(60)

SHAPES = uniform(3, 8)
SLOT = SHAPES[0].slot_bytes


def wish(engine: FakeEngine, layer: int, experts: list[int], times: int = 1) -> None:
    """Let a router choose experts that are not loaded for it."""
    for _ in range(times):
        engine.manager.begin_step(1, "decode")
        engine.manager.observe(layer, [experts])
        engine.manager.end_step()


def swapped(engine: FakeEngine) -> None:
    until(lambda: not engine.manager.swapping)


# ---- the manager's swaps


def test_a_wished_for_expert_takes_the_place_of_the_least_wished_for_in_the_background(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.step({0: [[0, 1]], 1: [[0, 1]]})
        wish(engine, 0, [0, 1], 3)
        wish(engine, 2, [5, 6], 2)
        engine.file.hold()
        assert engine.manager.swap(1) == 1
        assert engine.manager.swapping
        assert engine.manager.swap(1) == 0  # one after the other
        engine.manager.end_step()  # does not give it up, as it does a prefetch
        engine.file.let_all()
        swapped(engine)
        stats = engine.manager.stats()
        assert (stats.swaps, stats.evictions, stats.resident_experts) == (1, 1, 4)
        assert engine.manager.resident(2)[[5, 6]].sum() == 1
        assert engine.manager.resident(0)[[0, 1]].all()
        engine.check()


def test_nothing_is_swapped_for_an_expert_that_is_not_clearly_likelier(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 2 * SLOT) as engine:
        engine.step({0: [[0, 1]]})
        assert engine.manager.swap(2) == 0
        wish(engine, 1, [2, 3])
        assert engine.manager.swap(1, margin=1.25) == 0
        assert engine.manager.stats().evictions == 0


def test_what_enters_and_leaves_may_be_decided_by_something_else_than_the_policy(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 3 * SLOT) as engine:
        engine.step({0: [[0, 1]], 1: [[0, 1]]})
        kept = np.flatnonzero(np.concatenate([engine.manager.resident(layer) for layer in SHAPES]))
        worth = np.arange(24, dtype=float)  # the last experts of the last layer
        assert engine.manager.swap(2, worth=worth) == 2
        swapped(engine)
        resident = np.flatnonzero(np.concatenate([engine.manager.resident(layer) for layer in SHAPES]))
        assert resident.tolist() == [kept[-1], 22, 23]
        engine.check()


# ---- what matters


@given(st.integers(0, 2**32))
def test_importance_is_the_decayed_sum_of_norms_and_weights_over_all_that_was_wished_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    importance = Importance({4: 3, 2: 4}, half_life=2.0)
    expected = np.zeros(7)
    for _ in range(5):
        importance.advance(1)
        expected *= 2**-0.5
        for layer, first, count in ((2, 0, 4), (4, 4, 3)):
            tokens = int(rng.integers(1, 4))
            routes = np.array([rng.permutation(count)[:2] for _ in range(tokens)])
            weights, inputs = rng.random((tokens, 2)) + 0.1, rng.normal(size=(tokens, 5))
            importance.note(layer, routes, weights, inputs)
            for ids, shares, row in zip(routes, weights, inputs, strict=True):
                for expert, share in zip(ids, shares / shares.sum(), strict=True):
                    expected[first + expert] += np.linalg.norm(row) * share
    assert np.allclose(importance.worth(), expected)


def test_of_a_prompt_the_newest_token_counts_most() -> None:
    importance = Importance({0: 2}, half_life=1.0)
    importance.note(0, np.array([[0], [0], [1]]), np.ones((3, 1)), None, prompt=True)
    assert importance.worth().tolist() == [0.75, 1.0]


def test_tokens_count_alike_where_their_inputs_are_not_known() -> None:
    importance = Importance({0: 3})
    importance.note(0, np.array([[2, 1]]), np.array([[6.0, 2.0]]), None)
    assert importance.worth().tolist() == [0.0, 0.25, 0.75]


# ---- when to swap


class Instant:
    """Stands for a manager whose swaps end when told."""

    def __init__(self) -> None:
        self.swapping = False
        self.begun = 0

    def swap(self, most: int, *, worth: Any = None, margin: float = 1.0) -> int:
        assert not self.swapping
        self.begun += 1
        self.swapping = True
        return most


def test_the_next_swap_begins_between_steps_when_the_last_one_has_ended() -> None:
    manager = Instant()
    swapper = Swapper(manager, Importance({0: 4}))
    begun = []
    for ended in (False, False, True, False, True, True):
        manager.swapping &= not ended
        swapper.after_step()
        begun.append(manager.begun)
    assert begun == [1, 1, 2, 2, 3, 4]


# ---- what every layer keeps


@given(st.integers(0, 2**32), st.integers(0, 6))
def test_all_that_may_leave_can_leave_together_and_the_best_of_each_layer_stay(seed: int, floor: int) -> None:
    rng = np.random.default_rng(seed)
    layers = np.repeat(np.arange(4), rng.integers(1, 10, 4))
    resident = rng.random(len(layers)) < 0.6
    candidates = np.flatnonzero(resident & (rng.random(len(layers)) < 0.8))
    scores = rng.integers(0, 4, len(candidates)).astype(float)
    may_leave = spare_every_layer(layers, resident, floor, candidates, scores)
    for layer in range(4):
        mine = layers[candidates] == layer
        held = int(resident[layers == layer].sum())
        assert may_leave[mine].sum() == max(0, min(int(mine.sum()), held - floor))
        if may_leave[mine].any() and not may_leave[mine].all():
            assert scores[mine & may_leave].max() <= scores[mine & ~may_leave].min()


def test_every_layer_has_a_token_s_experts_from_the_start_and_keeps_them(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 12 * SLOT, every_layer=True) as engine:
        engine.manager.warm_up()
        assert all(engine.manager.resident(layer).sum() == 2 for layer in SHAPES)
        assert engine.manager.stats().decode.misses == 0
        for phase in ("prefill", "decode"):
            engine.step({layer: [[0, 1], [2, 3], [4, 5], [6, 7]] for layer in SHAPES}, phase=phase)
            assert all(engine.manager.resident(layer).sum() >= 2 for layer in SHAPES)
        wish(engine, 2, [6, 7], 50)
        for _ in range(20):
            engine.manager.swap(1)
            swapped(engine)
        assert all(engine.manager.resident(layer).sum() >= 2 for layer in SHAPES)
        engine.resize(6 * SLOT)
        assert [engine.manager.resident(layer).sum() for layer in SHAPES] == [2, 2, 2]
        engine.check()


@pytest.mark.parametrize(("slots", "kept"), [(6, 2), (12, 2), (17, 3), (24, 5)])
def test_every_layer_begins_with_what_a_whole_layer_leaves_for_each(tmp_path: Path, slots: int, kept: int) -> None:
    with fake_engine(tmp_path, SHAPES, slots * SLOT, every_layer=True) as engine:
        engine.manager.warm_up()
        assert [engine.manager.resident(layer).sum() for layer in SHAPES] == [kept] * 3
        engine.check()


@pytest.mark.parametrize("slots", [6, 7, 9, 12, 17, 24])
def test_a_prompt_may_need_as_many_experts_of_a_layer_as_there_is_room_beside_what_others_keep(
    tmp_path: Path, slots: int
) -> None:
    with fake_engine(tmp_path, SHAPES, slots * SLOT, every_layer=True) as engine:
        engine.manager.warm_up()
        most = {layer: min(8, engine.manager.capacity(layer)) for layer in SHAPES}
        assert all(count >= 2 for count in most.values())
        for first in (0, 3, 5):  # other experts every time
            engine.step(
                {layer: [[(first + place) % 8] for place in range(count)] for layer, count in most.items()},
                phase="prefill",
            )
            assert all(engine.manager.resident(layer).sum() >= 2 for layer in SHAPES)
            engine.check()


def test_a_budget_without_room_for_that_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(BudgetError, match="in every layer at once")
    with refused, fake_engine(tmp_path, SHAPES, 5 * SLOT, every_layer=True):
        pass
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, every_layer=True) as engine:
        with pytest.raises(BudgetError, match=f"Give at least {6 * SLOT} bytes"):
            engine.manager.resize(5 * SLOT)
        assert engine.manager.budget == 6 * SLOT
