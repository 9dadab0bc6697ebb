"""The manager's promises to an engine, one at a time."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from expertier.errors import BudgetError, ExpertLoadError
from expertier.manager import ManagerConfig, OffloadManager
from expertier.storage import PAGE
from support.fake_engine import FakeEngine, LayerShape, Worker, fake_engine, uniform, until

pytestmark = pytest.mark.timeout(60)

SHAPES = uniform(3, 8)
SLOT = SHAPES[0].slot_bytes


def resident(engine: FakeEngine) -> set[tuple[int, int]]:
    return {
        (layer, expert) for layer in engine.shapes for expert in np.flatnonzero(engine.manager.resident(layer)).tolist()
    }


def test_what_an_engine_computes_on_is_exactly_what_it_asked_for(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT) as engine:
        dice = np.random.default_rng(0)
        for _ in range(50):
            engine.step({layer: [dice.permutation(8)[:2]] for layer in SHAPES})
            engine.check()
        assert engine.manager.stats().peak_resident_bytes == 6 * SLOT


def test_a_resident_layer_is_a_ready_hit_and_reads_nothing(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.step({0: [[1, 5]]})
        read = engine.manager.stats().bytes_read
        engine.step({0: [[5, 1]]})
        stats = engine.manager.stats()
        assert stats.bytes_read == read
        assert (stats.decode.ready_hits, stats.decode.late, stats.decode.misses) == (2, 0, 2)
        assert (stats.decode.steps, stats.decode.tokens) == (2, 2)
        assert resident(engine) == {(0, 1), (0, 5)}


def test_prefill_and_decode_are_counted_apart(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 8 * SLOT) as engine:
        engine.step({0: [[0, 1], [1, 2], [2, 3]]}, phase="prefill")
        engine.step({0: [[3, 4]]})
        stats = engine.manager.stats()
        assert (stats.prefill.tokens, stats.prefill.misses, stats.prefill.ready_hits) == (3, 4, 0)
        assert (stats.decode.tokens, stats.decode.misses, stats.decode.ready_hits) == (1, 1, 1)
        assert stats.decode.hit_ratio == 0.5


@pytest.mark.parametrize("slots", [2, 5, 9])
def test_hits_misses_and_residents_are_those_of_an_lru_cache_on_paper(tmp_path: Path, slots: int) -> None:
    dice = np.random.default_rng(slots)
    last_use: dict[tuple[int, int], tuple[int, int]] = {}
    cache: set[tuple[int, int]] = set()
    hits = misses = evictions = 0
    with fake_engine(tmp_path, SHAPES, slots * SLOT, policy="lru") as engine:
        for token in range(80):
            engine.manager.begin_step(1)
            for layer in SHAPES:
                route = [int(expert) for expert in dice.zipf(1.5, 20) % 8]
                route = list(dict.fromkeys(route))[:2]
                engine.layer(layer, [route])
                wanted = {(layer, expert) for expert in route}
                last_use.update(dict.fromkeys(wanted, (token, layer)))
                hits += len(wanted & cache)
                misses += len(wanted - cache)
                for new in sorted(wanted - cache):
                    if len(cache) == slots:
                        # Ties, experts of the same layer and token, go by number.
                        cache.remove(min(cache - wanted, key=lambda old: (last_use[old], old)))
                        evictions += 1
                    cache.add(new)
                assert resident(engine) == cache
            engine.manager.end_step()
        stats = engine.manager.stats()
        assert (stats.decode.ready_hits, stats.decode.misses, stats.evictions) == (hits, misses, evictions)
        assert stats.resident_experts == len(cache)
        engine.check()


def test_a_slot_of_the_same_size_is_handed_over_and_not_given_back(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.step({0: [[0, 1]], 1: [[0, 1]]})
        slots = {id(slot) for slot in engine.pool.memory.values()}
        engine.step({2: [[0, 1, 2, 3]]})
        assert {id(slot) for slot in engine.pool.memory.values()} == slots
        assert engine.pool.handed_over == 4


def test_layers_of_different_slot_sizes_share_a_budget(tmp_path: Path) -> None:
    shapes = {
        0: LayerShape(experts=8, top_k=2, parts=(PAGE, PAGE)),
        3: LayerShape(experts=6, top_k=2, parts=(3 * PAGE, 8, PAGE)),
        7: LayerShape(experts=4, top_k=1, parts=(24 * PAGE,)),
    }
    budget = 30 * PAGE
    dice = np.random.default_rng(3)
    with fake_engine(tmp_path, shapes, budget) as engine:
        for _ in range(60):
            engine.step({layer: [dice.permutation(shape.experts)[: shape.top_k]] for layer, shape in shapes.items()})
            engine.check()
        assert engine.pool.peak <= budget


def test_small_experts_are_kept_when_all_of_them_together_make_no_room(tmp_path: Path) -> None:
    shapes = {0: LayerShape(experts=8, top_k=1, parts=(PAGE,)), 1: LayerShape(experts=2, top_k=1, parts=(8 * PAGE,))}
    with fake_engine(tmp_path, shapes, 10 * PAGE) as engine:
        lease = engine.manager.acquire(0, [0])
        engine.layer(0, [1])
        engine.layer(0, [2])
        other = Worker(engine.layer, 1, [0])
        until(lambda: engine.manager._tight)
        assert resident(engine) == {(0, 0), (0, 1), (0, 2)}, "evicting the unpinned ones would not have been enough"
        lease.release()
        other.join()
        assert resident(engine) == {(1, 0)}


def test_the_first_parts_of_all_experts_arrive_before_any_second_part(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, io_threads=1) as engine:
        engine.layer(1, [2, 4, 6])
        stage_of = {}
        for stage in range(2):
            for expert in range(8):
                offset, _ = engine.pool.place_of(1, expert, stage)
                stage_of[offset // PAGE * PAGE] = stage
        assert [stage_of[offset] for offset, _ in engine.file.reads] == [0, 0, 0, 1, 1, 1]


def test_the_first_part_can_be_used_while_the_second_is_on_its_way(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, io_threads=1) as engine:
        engine.file.hold()
        lease = engine.manager.acquire(0, [3, 5], wait=False)
        assert not lease.ready(0)
        engine.file.let(2)
        lease.wait(0)
        assert lease.ready(0)
        assert not lease.ready(1)
        engine.pool.verify(0, [3, 5], 0)
        assert not engine.manager.resident(0).any()
        engine.file.let_all()
        lease.wait()
        assert lease.ready(1)
        engine.pool.verify(0, [3, 5], 1)
        lease.release()
        assert engine.manager.stats().decode.stall_seconds > 0


def test_a_layer_that_needs_nothing_gets_an_empty_lease(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.manager.begin_step(1)
        for nothing in ([], np.empty((0, 2), np.int64)):
            engine.manager.observe(0, nothing)
            with engine.manager.acquire(0, nothing) as lease:
                assert lease.ready(1)
                lease.wait()
        assert engine.manager.prefetch(1, [], limit=4) == 0
        assert engine.manager.stats().decode.requests == 0
        engine.check()


def test_an_expert_named_twice_is_loaded_and_pinned_once(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        for _ in range(2):
            engine.layer(0, [[1, 2], [2, 1], [2, 3]])
        engine.layer(0, [[5, 5]], observe=False)
        assert engine.manager.stats().decode.misses == 4
        engine.step({1: [[0, 1]], 2: [[0, 1]]})
        engine.step({0: [[4, 5]], 1: [[4, 5]]})
        engine.check()


@pytest.mark.parametrize("wrong", [[-1], [8], [0, 99]])
def test_an_expert_the_layer_does_not_have_is_refused(tmp_path: Path, wrong: list[int]) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        with pytest.raises(ExpertLoadError, match="Layer 1 has 8 experts"):
            engine.manager.acquire(1, wrong)
        engine.check()
        engine.step({1: [[0, 7]]})


def test_a_step_that_cannot_fit_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.step({0: [[0, 1]]})
        with pytest.raises(BudgetError, match=r"needs 5 experts.*fewer tokens per step"):
            engine.manager.acquire(1, range(5))
        assert resident(engine) == {(0, 0), (0, 1)}
        engine.step({1: [[0, 1], [2, 3]]})
        engine.check()


def test_releasing_twice_unpins_once(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 3 * SLOT) as engine:
        first, second = engine.manager.acquire(0, [0]), engine.manager.acquire(0, [0])
        first.release()
        first.release()
        for expert in range(5):
            engine.layer(1, [expert, expert + 1])
        engine.pool.verify(0, [0], 1)
        second.release()
        engine.layer(1, [0, 2, 4])
        assert not engine.manager.resident(0).any()


def test_whoever_finds_no_room_waits_for_a_release(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        lease = engine.manager.acquire(0, [0, 1, 2])
        other = Worker(engine.layer, 1, [4, 5])
        until(lambda: engine.manager._tight)
        assert engine.manager.resident(0)[:3].all()
        lease.release()
        other.join()
        engine.check()
        assert engine.manager.stats().decode.stall_seconds > 0


def test_two_callers_may_need_the_same_load(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.file.hold()
        workers = [Worker(engine.layer, 0, [1, 2]) for _ in range(3)]
        until(lambda: engine.manager._leases == 3)
        engine.file.let_all()
        for worker in workers:
            worker.join()
        stats = engine.manager.stats()
        assert (stats.decode.misses, stats.decode.late) == (2, 4)
        engine.check()


def test_within_a_step_the_newest_token_counts_as_the_latest_use(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 3 * SLOT, policy="lru") as engine:
        engine.step({0: [[4], [2], [6]]}, phase="prefill")
        engine.step({1: [[0]]})
        assert resident(engine) == {(0, 2), (0, 6), (1, 0)}
        engine.step({1: [[1]]})
        assert resident(engine) == {(0, 6), (1, 0), (1, 1)}


def test_the_tokens_of_a_decode_batch_are_of_one_moment_and_count_each(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 3 * SLOT, half_life=1.0) as engine:
        engine.step({0: [[4], [4], [2], [6]]})  # as a prompt, the newest tokens 2 and 6 would outweigh both uses of 4
        engine.step({1: [[0]]})
        engine.step({1: [[1]]})
        assert resident(engine) == {(0, 4), (1, 0), (1, 1)}


def test_everything_is_held_for_a_token_only_when_nothing_is_absent(tmp_path: Path) -> None:
    layers, experts = len(SHAPES), SHAPES[0].experts
    with fake_engine(tmp_path, SHAPES, layers * experts * SLOT) as engine:
        assert engine.manager.hold_all() is None
        assert engine.manager.stats().decode.steps == 0
        for layer in range(layers):
            engine.layer(layer, range(experts))
        before = engine.manager.stats().decode
        lease = engine.manager.hold_all()
        assert lease is not None
        after = engine.manager.stats().decode
        assert (after.steps, after.tokens) == (before.steps + 1, before.tokens + 1)
        assert after.ready_hits == before.ready_hits + layers * SHAPES[0].top_k
        shrinking = Worker(engine.resize, 2 * SLOT)
        until(lambda: engine.manager._tight)
        assert len(resident(engine)) == layers * experts, "what is held cannot leave"
        lease.release()
        shrinking.join()
        assert engine.manager.hold_all() is None
        engine.check()


def test_in_a_step_of_many_tokens_layers_already_finished_give_way_first(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, policy="lru") as engine:
        # Layer 2 is the one used longest ago, but it is still to come.
        engine.step({2: [[0, 1]]})
        engine.step({0: [[0, 1]]})
        engine.manager.begin_step(3, "prefill")
        engine.layer(0, [[0, 1], [1, 0], [0, 1]])
        engine.layer(1, [[0, 1], [2, 3], [0, 1]])
        assert engine.manager.resident(2)[:2].all()
        assert not engine.manager.resident(0).any()


def test_a_step_that_needs_few_experts_of_each_layer_takes_the_least_used_of_all(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, policy="lru") as engine:
        engine.step({2: [[0, 1]]})
        engine.step({0: [[0, 1]]})
        engine.manager.begin_step(3, "prefill")
        engine.layer(0, [[0, 1], [1, 0], [0, 1]])
        engine.layer(1, [[0, 1], [2, 0], [0, 1]])
        assert engine.manager.resident(0)[:2].all()
        assert engine.manager.resident(2).sum() == 1


def test_a_layer_never_holds_more_than_its_quota(tmp_path: Path) -> None:
    quotas = {0: 4 * SLOT, 2: 3 * SLOT}
    dice = np.random.default_rng(5)
    with fake_engine(tmp_path, SHAPES, 8 * SLOT, quotas=quotas) as engine:
        for _ in range(80):
            engine.manager.begin_step(1)
            for layer in SHAPES:
                engine.manager.prefetch(layer, dice.permutation(8)[:3], limit=3)
                engine.layer(layer, [dice.permutation(8)[: dice.integers(1, 4)]])
            engine.manager.end_step()
            engine.check()


def test_a_quota_reached_in_the_middle_of_a_step_ends_taking_from_other_layers(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 6 * SLOT, quotas={0: 3 * SLOT}, policy="lru") as engine:
        engine.step({1: [[0, 1]], 2: [[0, 1]]})
        engine.step({0: [[0, 1]]})
        # One slot of the quota is left, the budget is full, and the oldest experts are those of other layers.
        engine.step({0: [[2, 3]]})
        assert engine.manager.resident(0).sum() == 3
        engine.check()


def test_a_step_beyond_its_quota_is_refused(tmp_path: Path) -> None:
    with (
        fake_engine(tmp_path, SHAPES, 8 * SLOT, quotas={0: 3 * SLOT}) as engine,
        pytest.raises(BudgetError, match="needs 4 experts"),
    ):
        engine.manager.acquire(0, range(4))


def test_a_pool_that_has_the_bytes_at_hand_needs_no_reads(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        engine.pool.at_hand.add(1)
        engine.step({0: [[0, 1]], 1: [[2, 3]]})
        assert engine.manager.prefetch(1, [4], [1.0], limit=1) == 1
        engine.step({1: [[4, 3]]})
        stats = engine.manager.stats()
        assert (stats.prefetches, stats.prefetches_used, stats.decode.misses) == (1, 1, 4)
        engine.check()


@pytest.mark.parametrize(
    ("budget", "quotas", "message"),
    [
        (2 * SLOT - 1, None, "one token needs in layer 0"),
        (8 * SLOT, {1: 2 * SLOT - 1}, "quota of .* layer 1"),
        (8 * SLOT, {5: 8 * SLOT}, "layer 5, which has no experts"),
    ],
)
def test_a_budget_or_quota_below_one_token_is_refused_at_the_start(
    tmp_path: Path, budget: int, quotas: dict[int, int] | None, message: str
) -> None:
    with pytest.raises(BudgetError, match=message), fake_engine(tmp_path, SHAPES, budget, quotas=quotas):
        pass


def test_the_smallest_budget_allowed_runs_every_layer(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 2 * SLOT) as engine:
        for token in range(10):
            engine.step({layer: [[token % 8, (token + 3) % 8]] for layer in SHAPES})
        engine.check()


def test_counters_are_a_snapshot_and_turn_into_plain_data(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT) as engine:
        before = engine.manager.stats()
        assert before.as_dict()["decode"]["hit_ratio"] is None
        engine.step({0: [[0, 1]]})
        engine.step({0: [[0, 2]]})
        assert before.decode.misses == 0
        data = engine.manager.stats().as_dict()
        assert data["decode"]["requests"] == 4
        assert data["decode"]["hit_ratio"] == data["decode"]["ready_hit_ratio"] == 0.25
        assert data["total_experts"] == 24
        assert data["total_bytes"] == 24 * SLOT


def test_every_policy_runs_behind_the_manager(tmp_path: Path) -> None:
    misses: dict[str, int] = defaultdict(int)
    for policy in ("lru", "lfu", "lfru", "edge", "predictive"):
        dice = np.random.default_rng(11)
        with fake_engine(tmp_path, SHAPES, 5 * SLOT, policy=policy) as engine:
            for _ in range(30):
                engine.step({layer: [dice.permutation(8)[:2]] for layer in SHAPES})
                engine.check()
            misses[policy] = engine.manager.stats().decode.misses
    assert all(misses.values())


def test_the_manager_says_which_settings_are_in_force(tmp_path: Path) -> None:
    with fake_engine(tmp_path, SHAPES, 4 * SLOT, policy="lru", io_threads=3) as engine:
        assert isinstance(engine.manager, OffloadManager)
        assert engine.manager.config == ManagerConfig(policy="lru", io_threads=3)
        assert engine.manager.budget == 4 * SLOT
