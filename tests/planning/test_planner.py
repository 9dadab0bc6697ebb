"""The planner: what budgets are expected to give, and what it refuses."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.errors import BudgetError, RoutingDemandError
from expertier.planning.demand import LayerDemand, RoutingDemand, read_demand
from expertier.planning.planner import EXACT, QualitySetting, trade_off
from expertier.planning.speed import EngineSpeed, SpeedSample, fit_speed, read_speed, usual_steps
from expertier.planning.split import best_split
from expertier.simulation import load_events, replay
from expertier.simulation.demand import summarise
from support.traces import header, skewed_routes, write_trace

SPEED = EngineSpeed(
    engine="x", fingerprint="f" * 64, threads=1, resident_seconds=0.01, managed_seconds=0.012, load_seconds=0.002
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> RoutingDemand:
    shape = header(layers=3, experts=8, top_k=2)
    trace = write_trace(tmp_path_factory.mktemp("trace") / "t", shape, skewed_routes(shape, 400))
    return summarise(load_events(trace))


class Curves:
    """Quality as some profile knows it."""

    def settings(self, share: float) -> list[QualitySetting]:
        return [
            QualitySetting(bias=0.1, protect=0, loads_ratio=0.6, perplexity_rise=0.004),
            QualitySetting(bias=0.4, protect=1, loads_ratio=0.3, perplexity_rise=0.03),
        ]


def test_the_profile_says_what_replays_of_the_whole_trace_say(tmp_path: Path) -> None:
    shape = header(layers=3, experts=8, top_k=2)
    events = load_events(write_trace(tmp_path / "t", shape, skewed_routes(shape, 400)))
    found = summarise(events)
    assert [point.budget_bytes for point in found.points] == sorted({point.budget_bytes for point in found.points})
    point = min(found.points, key=lambda point: abs(point.budget_bytes - found.total_bytes // 2))
    counted = events.step >= 40  # the first tenth fills an empty pool
    misses = replay(events, "lfu", point.budget_bytes).misses[counted].sum()
    assert point.loads_per_token == pytest.approx(misses / 360)
    assert found.hit_ratio(point.budget_bytes) == pytest.approx(point.hit_ratio)
    assert found.loads_per_token(found.total_bytes) == 0


def test_more_memory_never_means_more_loads_nor_less_speed(profile: RoutingDemand) -> None:
    found = trade_off(profile, profile.total_bytes, smallest=2 * 4096, largest=1 << 40, speed=SPEED)
    loads = [point.loads_per_token for point in found.curve]
    speeds = [point.tokens_per_second for point in found.curve]
    assert all(after <= before + 0.05 for before, after in itertools.pairwise(loads))
    assert speeds[-1] == pytest.approx(100.0)
    assert max(speeds) == speeds[-1] > speeds[0]


@given(st.integers(min_value=0, max_value=30 * 4096), st.floats(min_value=0, max_value=0.1))
def test_no_plan_exceeds_its_budget_or_its_quality_budget(profile: RoutingDemand, budget: int, rise: float) -> None:
    smallest = 2 * 4096
    if budget < smallest:
        with pytest.raises(BudgetError, match="impossible here"):
            trade_off(profile, budget, smallest=smallest, largest=1 << 40)
        return
    found = trade_off(profile, budget, smallest=smallest, largest=1 << 40, quality=Curves(), most_rise=rise)
    assert found.chosen.budget_bytes <= budget
    assert found.chosen.setting.perplexity_rise <= rise
    assert sum(found.layers.slots) * 4096 <= budget
    assert found.layers.staging_bytes <= budget


def test_the_fastest_setting_within_the_quality_budget_is_chosen(profile: RoutingDemand) -> None:
    half = profile.total_bytes // 2
    chosen = [
        trade_off(profile, half, smallest=8192, largest=1 << 40, speed=SPEED, quality=Curves(), most_rise=rise).chosen
        for rise in (0.0, 0.01, 0.05)
    ]
    assert [plan.setting.bias for plan in chosen] == [0.0, 0.1, 0.4]
    assert chosen[0].setting == EXACT
    speeds = [plan.tokens_per_second or 0.0 for plan in chosen]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    assert chosen[2].loads_per_token == pytest.approx(0.3 * chosen[0].loads_per_token)


def test_a_budget_that_memory_does_not_leave_is_refused(profile: RoutingDemand) -> None:
    with pytest.raises(BudgetError, match="memory leaves"):
        trade_off(profile, 20 * 4096, smallest=8192, largest=10 * 4096)


@given(
    st.lists(
        st.lists(st.floats(min_value=0, max_value=1), min_size=3, max_size=5),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.integers(min_value=1, max_value=3), min_size=3, max_size=3),
    st.integers(min_value=0, max_value=30),
)
def test_the_division_among_layers_is_the_best_of_all(curves: list[list[float]], slots: list[int], budget: int) -> None:
    layers = [
        LayerDemand(
            layer=place,
            experts=len(curve) - 1,
            top_k=1,
            slot_bytes=slots[place],
            misses=tuple(sorted(curve, reverse=True)),
        )
        for place, curve in enumerate(curves)
    ]
    possible = [
        sum(layer.misses[count] for layer, count in zip(layers, counts, strict=True))
        for counts in itertools.product(*(range(1, layer.experts + 1) for layer in layers))
        if sum(count * layer.slot_bytes for layer, count in zip(layers, counts, strict=True)) <= budget
    ]
    found = best_split(layers, budget)
    if not possible:
        assert found is None
        return
    assert found is not None
    assert sum(count * layer.slot_bytes for layer, count in zip(layers, found[0], strict=True)) <= budget
    assert found[1] == pytest.approx(min(possible))


def test_compute_and_loads_are_told_apart() -> None:
    random = np.random.default_rng(0)
    samples = []
    for budget, most in ((10, 12), (20, 4), (100, 0)):
        loads = random.integers(0, most + 1, 64)
        seconds = (0.02 if most else 0.015) + 0.003 * loads + random.normal(0, 2e-4, 64)
        seconds[5] += 1.0  # the system did something else
        samples.append(SpeedSample(budget_bytes=budget, seconds=tuple(seconds), loads=tuple(loads.tolist())))
    speed = fit_speed(samples, total_bytes=100, engine="x", fingerprint="f", threads=2)
    assert speed.load_seconds == pytest.approx(0.003, rel=0.05)
    assert speed.managed_seconds == pytest.approx(0.02, rel=0.05)
    assert speed.resident_seconds == pytest.approx(0.015, rel=0.05)


def test_the_mean_of_a_budget_counts_and_not_how_dear_its_worst_steps_are() -> None:
    random = np.random.default_rng(1)
    samples = []
    for budget, often in ((10, 0.4), (50, 0.1), (100, 0.0)):
        loads = np.where(random.random(256) < often, 10, 0)
        seconds = 0.01 + 0.0001 * loads**2 * 2 + 0.0002 * random.random(256)
        samples.append(SpeedSample(budget_bytes=budget, seconds=tuple(seconds), loads=tuple(loads.tolist())))
    speed = fit_speed(samples, total_bytes=100, engine="x", fingerprint="f", threads=1)
    for sample in samples[:2]:
        usual = np.array(sample.seconds)[usual_steps(sample)]
        loads = np.array(sample.loads)[usual_steps(sample)]
        assert speed.token_seconds(float(loads.mean())) == pytest.approx(usual.mean())
    assert speed.token_seconds(0.0) == speed.managed_seconds == pytest.approx(0.0101, rel=0.01)
    most = speed.measured[-1]
    assert speed.token_seconds(most[0] + 1) == pytest.approx(most[1] + speed.load_seconds)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(1e-3, 1.0)), min_size=1, max_size=4), st.floats(0, 40))
def test_more_loads_never_take_less_time(budgets: list[tuple[float, float]], more: float) -> None:
    samples = [
        SpeedSample(budget_bytes=place, seconds=(seconds,) * 24, loads=(round(loads),) * 24)
        for place, (loads, seconds) in enumerate(budgets)
    ]
    speed = fit_speed(samples, total_bytes=100, engine="x", fingerprint="f", threads=1)
    times = [speed.token_seconds(loads) for loads in (0.0, *sorted((more / 3, more)))]
    assert times == sorted(times)
    assert min(times) > 0


def test_too_short_a_measurement_is_refused() -> None:
    short = SpeedSample(budget_bytes=1, seconds=(0.1,) * 5, loads=(1,) * 5)
    with pytest.raises(RoutingDemandError, match="Only 5 steps"):
        fit_speed([short], total_bytes=100, engine="x", fingerprint="f", threads=1)
    enough = replace(short, budget_bytes=100, seconds=(0.1,) * 40, loads=(0,) * 40)
    with pytest.raises(RoutingDemandError, match="No budget below"):
        fit_speed([enough], total_bytes=100, engine="x", fingerprint="f", threads=1)


def test_profile_and_speed_survive_their_files(profile: RoutingDemand, tmp_path: Path) -> None:
    profile.write(tmp_path / "p.json")
    assert read_demand(tmp_path / "p.json") == profile
    SPEED.write(tmp_path / "s.json")
    assert read_speed(tmp_path / "s.json") == SPEED
    measured = replace(SPEED, measured=((1.0, 0.015), (5.0, 0.02)))
    measured.write(tmp_path / "m.json")
    assert read_speed(tmp_path / "m.json") == measured
    with pytest.raises(RoutingDemandError, match="not of other"):
        profile.require_model("0" * 64, "other")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.update(schema="x"),
        lambda data: data["points"].reverse(),
        lambda data: data["points"][0].update(loads_per_token=float("nan")),
        lambda data: data["layers"][0]["misses"].pop(),
        lambda data: data.pop("layers"),
    ],
)
def test_a_damaged_profile_is_refused_by_name(profile: RoutingDemand, tmp_path: Path, damage: object) -> None:
    profile.write(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    damage(data)  # type: ignore[operator]
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(RoutingDemandError, match="not a summary of routes") as caught:
        read_demand(tmp_path / "p.json")
    assert "expertier profile" in caught.value.remedy
    with pytest.raises(RoutingDemandError, match="speeds"):
        read_speed(tmp_path / "p.json")
