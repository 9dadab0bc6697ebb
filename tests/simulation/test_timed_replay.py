"""Simulated time goes through the real manager: without prefetch it finds what the plain replay finds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.errors import UnsupportedOptionError
from expertier.residency import POLICIES
from expertier.simulation import Events, Timing, load_events, replay
from expertier.simulation.prefetch import PREDICTORS, oracle_loads, replay_timed
from expertier.simulation.timing import step_times
from support.traces import header, skewed_routes, write_trace


def make_events(tokens: int, seed: int = 0, stages: int = 1, experts: int = 16) -> Events:
    shape = header(4, experts, 2, slot_bytes=(3 << 20, 5 << 20))
    layers = tuple(type(layer)(**{**vars(layer), "stages": stages}) for layer in shape.layers)
    shape = type(shape)(**{**vars(shape), "layers": layers})
    with tempfile.TemporaryDirectory() as directory:
        return load_events(write_trace(Path(directory) / "trace", shape, skewed_routes(shape, tokens, seed)))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.floats(0.1, 1.0),
    policy=st.sampled_from(sorted(POLICIES)),
    stages=st.integers(1, 3),
    bandwidth=st.floats(1e8, 1e11),
    latency=st.sampled_from([0.0, 1e-3]),
    load_cost=st.sampled_from([0.0, 2e-4]),
)
def test_without_prefetch_hits_bytes_and_time_are_those_of_the_plain_replay(
    seed: int, share: float, policy: str, stages: int, bandwidth: float, latency: float, load_cost: float
) -> None:
    events = make_events(40, seed, stages)
    budget = max(events.least_budget, int(share * events.header.total_bytes))
    timing = Timing(bandwidth=bandwidth, compute=0.02, latency=latency, load_cost=load_cost, expert_share=0.75)
    plain, timed = replay(events, policy, budget), replay_timed(events, policy, budget, timing)
    assert (timed.ready_hits, timed.late, timed.misses) == (plain.hits, 0, plain.requests - plain.hits)
    assert timed.bytes_read == plain.bytes_read.sum()
    assert timed.seconds / timed.steps == pytest.approx(step_times(events, plain, timing).demand)


@pytest.mark.parametrize("name", sorted(PREDICTORS))
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_prefetching_never_loads_less_than_needed_and_counts_every_need_once(name: str, share: float) -> None:
    events = make_events(150, stages=3)
    budget = int(share * events.header.total_bytes)
    timing = Timing(bandwidth=2e9, compute=0.02, latency=1e-4)
    timed = replay_timed(events, "lfu", budget, timing, loads=oracle_loads(name, events))
    assert timed.ready_hits + timed.late + timed.misses == len(events.set_experts)
    assert timed.prefetches_used <= timed.prefetches
    assert timed.seconds > timed.stall_seconds > 0


def test_knowing_the_next_layer_saves_time_and_guessing_badly_costs_bytes() -> None:
    events = make_events(200)
    budget = int(0.3 * events.header.total_bytes)
    timing = Timing(bandwidth=2e9, compute=0.02)
    plain = replay_timed(events, "lfu", budget, timing)
    known = replay_timed(events, "lfu", budget, timing, loads=oracle_loads("perfect", events))
    guessed = replay_timed(events, "lfu", budget, timing, loads=oracle_loads("previous", events))
    assert known.seconds < plain.seconds
    assert known.prefetches_used == known.prefetches > 0
    assert guessed.bytes_read > plain.bytes_read


def test_the_oracle_in_simulated_time_is_about_as_quick_as_the_row_in_every_table() -> None:
    """They differ in victims alone: the oracle's loads choose theirs one event earlier."""
    events = make_events(300, stages=3)
    budget = int(0.3 * events.header.total_bytes)
    timing = Timing(bandwidth=2e9, compute=0.02, latency=1e-4)
    oracle = replay_timed(events, "lfu", budget, timing, loads=oracle_loads("perfect", events, ahead=8))
    times = step_times(events, replay(events, "lfu", budget), timing)
    assert oracle.seconds / oracle.steps == pytest.approx(times.one_layer, rel=0.05)
    assert times.one_layer < times.demand


def test_what_prediction_and_its_loads_take_of_the_engine_is_charged_once() -> None:
    events = make_events(40)
    plain = Timing(bandwidth=2e9, compute=0.02)
    dear = Timing(bandwidth=2e9, compute=0.02, prediction=0.003)
    everything = events.header.total_bytes
    oracle = oracle_loads("perfect", events)

    def own_time(timing: Timing, *, ahead: bool) -> float:
        found = replay_timed(events, "lfu", everything, timing, loads=oracle if ahead else None)
        return found.seconds - found.stall_seconds

    assert own_time(plain, ahead=True) == pytest.approx(events.decode_steps * 0.02)
    assert own_time(dear, ahead=True) == pytest.approx(events.decode_steps * 0.023)
    assert own_time(dear, ahead=False) == pytest.approx(events.decode_steps * 0.02)
    loading = Timing(bandwidth=2e9, compute=0.02, load_cost=1e-4)
    found = replay_timed(events, "lfu", int(0.3 * everything), loading, loads=oracle)
    own = found.seconds - found.stall_seconds - events.decode_steps * 0.02
    assert own == pytest.approx(1e-4 * (found.misses + found.prefetches))


def test_a_predictor_is_known_by_name_or_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="Choose from: perfect"):
        oracle_loads("crystal ball", make_events(2))
