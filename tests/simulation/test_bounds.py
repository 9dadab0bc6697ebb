"""Nothing beats Belady, and Belady is what trying everything finds."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.errors import BudgetError
from expertier.residency import POLICIES
from expertier.routing.trace import TraceHeader
from expertier.simulation import Events, Timing, belady, load_events, replay
from expertier.simulation.timing import step_times
from support.traces import header, skewed_routes, write_trace

TIMING = Timing(bandwidth=1e6, compute=0.01, latency=1e-3, load_cost=1e-4, expert_share=0.7)


def make_events(shape: TraceHeader, tokens: int, seed: int = 0, batch: int = 1, drift: int = 20) -> Events:
    with tempfile.TemporaryDirectory() as directory:
        return load_events(
            write_trace(Path(directory) / "trace", shape, skewed_routes(shape, tokens, seed, drift), batch)
        )


def fewest_loads(events: Events, slots: int) -> int:
    """Try every choice of victims."""
    sets = [frozenset(events.working_set(event).tolist()) for event in range(len(events))]

    @functools.cache
    def best(event: int, resident: frozenset[int]) -> int:
        if event == len(sets):
            return 0
        wanted = sets[event]
        absent = wanted - resident
        spare = max(0, len(resident | wanted) - slots)
        candidates: Sequence[int] = sorted(resident - wanted)
        return len(absent) + min(
            best(event + 1, (resident | wanted) - frozenset(leaving)) for leaving in combinations(candidates, spare)
        )

    return best(0, frozenset())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), slots=st.integers(2, 6), batch=st.sampled_from([1, 2]))
def test_belady_loads_as_little_as_trying_every_victim_does(seed: int, slots: int, batch: int) -> None:
    shape = header(2, 4, 1)
    events = make_events(shape, 9 * batch, seed, batch)
    assert belady(events, slots * 4096).misses.sum() == fewest_loads(events, slots)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    slots=st.integers(3, 20),
    batch=st.integers(1, 3),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_no_policy_beats_belady_and_no_schedule_its_bounds(seed: int, slots: int, batch: int, policy: str) -> None:
    events = make_events(header(3, 8, 2), 60, seed, batch)
    budget = slots * 4096
    if budget < events.least_budget:
        with pytest.raises(BudgetError, match="largest working set"):
            replay(events, policy, budget)
        return
    found, best = replay(events, policy, budget), belady(events, budget)
    assert best.hits >= found.hits
    assert best.misses.sum() <= found.misses.sum()
    assert found.requests == best.requests == len(events.set_experts)
    for result in (found, best):
        times = step_times(events, result, TIMING)
        assert times.bound <= times.one_layer * (1 + 1e-9)
        assert times.one_layer <= times.demand * (1 + 1e-9)
    assert step_times(events, best, TIMING).bound <= step_times(events, found, TIMING).bound * (1 + 1e-9)


def test_with_room_for_everything_each_expert_is_loaded_once() -> None:
    events = make_events(header(3, 8, 2), 200)
    used = len(np.unique(events.set_experts))
    for result in (belady(events, events.header.total_bytes), replay(events, "lru", events.header.total_bytes)):
        assert result.misses.sum() == used
        assert result.bytes_read.sum() == used * 4096


def test_layers_of_other_sizes_share_the_pool_by_bytes() -> None:
    shape = header(3, 8, 2, slot_bytes=(4096, 12288))
    events = make_events(shape, 80)
    for result in (belady(events, 100_000), replay(events, "lfu", 100_000)):
        sizes = np.array([4096, 12288, 4096])[events.layer]
        assert np.array_equal(result.bytes_read, result.misses * sizes)
        assert 0 < result.hits < result.requests


def test_a_budget_below_the_largest_working_set_is_refused_with_the_least_possible_one() -> None:
    events = make_events(header(3, 8, 2), 10)
    for run in (belady, lambda e, b: replay(e, "lfu", b)):
        with pytest.raises(BudgetError, match="at least 8192 bytes"):
            run(events, 4096)  # type: ignore[operator]


def test_times_by_hand() -> None:
    """Two layers of one expert each per token, room for one: every event loads 1000 bytes."""
    shape = header(2, 1, 1, slot_bytes=(1000,))
    events = make_events(shape, 3)
    found = replay(events, "lru", 1000)
    assert found.misses.tolist() == [1] * 6
    slow = Timing(bandwidth=1000.0, compute=0.2, expert_share=0.5)  # a load takes 1 s, a layer 0.1 s
    times = step_times(events, found, slow)
    assert times.demand == pytest.approx(2 * (0.1 + 1.0))
    # From the second event on only the router's part of the next layer hides nothing: loads begin when it has spoken.
    assert times.one_layer == pytest.approx((6 * 1.0 + 0.05 + 0.05) / 3)
    assert times.bound == pytest.approx(2.0)
    quick = Timing(bandwidth=1e6, compute=0.2, expert_share=0.5)
    assert step_times(events, found, quick).bound == pytest.approx(0.2)
