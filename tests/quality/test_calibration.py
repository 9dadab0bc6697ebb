"""From texts to a profile, and from a profile to a setting."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.catalog.gguf import read_gguf
from expertier.catalog.types import Catalog
from expertier.errors import QualityBudgetError, QualityProfileError
from expertier.quality import Reference, samples
from expertier.quality.budget import QualityBudget, check_hard, parse_quality_budget, resolve
from expertier.quality.calibration import CalibrationPlan, calibrate, check_texts, next_bias
from expertier.quality.planning import BudgetedQuality
from expertier.quality.profile import Point, QualityProfile, find_profile, merged, profile_paths
from expertier.quality.proxy import Proxy, fit
from expertier.quality.serving import QualityKeeper, describe_losses
from expertier.quality.statistics import Interval
from expertier.virtual import VirtualExperts, VirtualSettings
from quality.sessions import TableSession
from support.tiny_gguf import TinySpec, write_tiny

ONE_PERCENT = QualityBudget(kind="perplexity", value=0.01)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def measured() -> QualityProfile:
    session = TableSession(harm=0.8)
    texts = samples(session, session.texts(10), count=10, tokens=40)
    with Reference(session, texts) as reference:
        found = calibrate(
            session, reference, CalibrationPlan(budgets=(25, 50), total_bytes=100, protects=(0, 1), points=4)
        )
    return QualityProfile(
        fingerprint="f" * 32,
        model="table.gguf",
        engine="none",
        policy="lfu",
        texts=10,
        tokens=found.evaluations[0].tokens,
        domains=("d0", "d1", "d2"),
        exact_cross_entropy=found.evaluations[0].exact_cross_entropy,
        points=found.points,
        proxy=fit(found.evaluations),
    )


def point(
    bias: float, high: float, loads: float, *, share: float = 0.25, protect: int = 0, hard: bool = False
) -> Point:
    return Point(
        share=share,
        bias=bias,
        protect=protect,
        hard=hard,
        increase=Interval(low=0.0, middle=high / 2, high=high),
        kl=Interval(low=0.0, middle=high / 2, high=high),
        agreement=1.0,
        loads_per_token=loads,
        bytes_per_token=loads,
        substituted=(0.1,),
    )


def profile_of(*points: Point) -> QualityProfile:
    return QualityProfile(
        fingerprint="f" * 32,
        model="m.gguf",
        engine="none",
        policy="lfu",
        texts=10,
        tokens=100,
        domains=("d",),
        exact_cross_entropy=2.0,
        points=points,
        proxy=Proxy(weights=(1.0,), scale=1.0, power=1.0, spread=0.0, rows=10),
    )


def test_bias_zero_is_measured_at_every_budget_and_costs_nothing(measured: QualityProfile) -> None:
    zeros = [point for point in measured.points if not point.bias]
    assert [point.share for point in zeros] == [0.5, 0.25]
    assert all(point.kl.high == 0.0 and point.agreement == 1.0 for point in zeros)


def test_points_gather_where_the_targets_are_crossed(measured: QualityProfile) -> None:
    curve = measured.curve(0.25, 0)
    assert 3 <= len(curve) <= 5
    assert curve[0].increase.high == 0.0
    assert curve[-1].increase.high > 0.01


def test_what_a_budget_resolves_to_was_within_it_when_measured(measured: QualityProfile) -> None:
    setting = resolve(ONE_PERCENT, measured, 0.25)
    assert setting.bias > 0
    curve = measured.curve(0.25, setting.protect)
    assert all(point.increase.high <= 0.01 for point in curve if point.bias <= setting.bias)
    assert setting.loads_per_token < curve[0].loads_per_token


def test_a_larger_budget_needs_no_more_loads(measured: QualityProfile) -> None:
    loads = [
        resolve(QualityBudget(kind="perplexity", value=value), measured, 0.25).loads_per_token
        for value in (0.002, 0.005, 0.01, 0.03, 0.1)
    ]
    assert loads == sorted(loads, reverse=True)


def test_a_text_too_few_is_refused_with_words() -> None:
    session = TableSession()
    with pytest.raises(QualityProfileError, match=r"3 texts promise nothing.*--text"):
        check_texts(samples(session, session.texts(3), count=3, tokens=10))


def test_protecting_is_chosen_where_it_needs_fewer_loads() -> None:
    plain = [point(0.0, 0.0, 10.0), point(0.2, 0.02, 4.0)]
    protected = [point(0.3, 0.01, 3.0, protect=1)]
    found = resolve(ONE_PERCENT, profile_of(*plain, *protected), 0.25)
    assert (found.protect, found.bias, found.loads_per_token) == (1, 0.3, 3.0)


def test_between_two_memory_budgets_the_stricter_one_decides() -> None:
    quarter = [point(0.0, 0.0, 10.0), point(0.4, 0.01, 4.0)]
    half = [point(0.0, 0.0, 5.0, share=0.5), point(0.1, 0.01, 2.0, share=0.5)]
    assert resolve(ONE_PERCENT, profile_of(*quarter, *half), 0.3).bias == pytest.approx(0.1)
    assert resolve(ONE_PERCENT, profile_of(*quarter, *half), 0.25).bias == pytest.approx(0.4)
    assert resolve(ONE_PERCENT, profile_of(*quarter, *half), 0.9).bias == pytest.approx(0.1)


def test_the_planner_is_told_what_serving_would_use() -> None:
    profile = profile_of(point(0.0, 0.0, 10.0), point(0.2, 0.02, 4.0))
    [setting] = BudgetedQuality(budget=ONE_PERCENT, profile=profile).settings(0.25)
    assert setting.bias == pytest.approx(0.1)
    assert setting.loads_ratio == pytest.approx(0.7)
    assert setting.perplexity_rise == pytest.approx(0.005)
    assert BudgetedQuality(budget=ONE_PERCENT, profile=profile).settings(0.1) == ()


def test_less_memory_than_was_measured_is_refused_with_the_command() -> None:
    profile = profile_of(point(0.0, 0.0, 10.0), point(0.4, 0.01, 4.0))
    with pytest.raises(QualityBudgetError, match=r"begins at 25 %.*expertier profile m.gguf --quality --at 12%"):
        resolve(ONE_PERCENT, profile, 0.125)


@given(
    st.lists(st.tuples(st.floats(0.01, 2), st.floats(-0.01, 0.2)), min_size=1, max_size=6),
    st.floats(0.0001, 0.3),
)
def test_a_resolved_bias_is_never_beyond_a_point_that_costs_more(rows: list[tuple[float, float]], limit: float) -> None:
    points = [point(0.0, 0.0, 10.0), *(point(bias, high, 1.0) for bias, high in rows)]
    found = resolve(QualityBudget(kind="perplexity", value=limit), profile_of(*points), 0.25)
    assert 0 <= found.bias <= max(bias for bias, _ in rows)
    assert all(high <= limit for bias, high in rows if bias < found.bias)


def test_hard_mode_that_costs_more_than_allowed_names_the_memory_that_would_do() -> None:
    profile = profile_of(point(0.0, 0.6, 2.0, hard=True), point(0.0, 0.009, 1.0, share=0.75, hard=True))
    with pytest.raises(QualityBudgetError, match=r"up to 60.0 %.*at least 75%.*leave hard mode"):
        check_hard(ONE_PERCENT, profile, 0.25)
    assert check_hard(ONE_PERCENT, profile, 0.8).high == 0.009
    with pytest.raises(QualityBudgetError, match="--hard"):
        check_hard(ONE_PERCENT, profile_of(point(0.0, 0.0, 1.0)), 0.25)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (None, "exact", 0), ("exact", "exact", 0), ("0", "exact", 0), (0, "exact", 0), ("0%", "exact", 0),
        ("1%", "perplexity", 0.01), (" 0.5 % ", "perplexity", 0.005), ("0.2", "bias", 0.2), (0.2, "bias", 0.2),
        (".3", "bias", 0.3),
    ],
)  # fmt: skip
def test_quality_budgets_are_read_as_people_write_them(text: str | float | None, kind: str, value: float) -> None:
    found = parse_quality_budget(text)
    assert (found.kind, found.value) == (kind, pytest.approx(value))


@pytest.mark.parametrize("text", ["-1%", "nan", "inf", "1 percent", "%", "", "101%", True, "1e3"])
def test_other_quality_budgets_are_refused(text: str) -> None:
    with pytest.raises(QualityBudgetError):
        parse_quality_budget(text)


@given(st.lists(st.tuples(st.floats(0.001, 3), st.floats(0, 1), st.floats(0, 10)), max_size=6))
def test_the_next_bias_is_new_and_above_zero(rows: list[tuple[float, float, float]]) -> None:
    points = [point(0.0, 0.0, 10.0), *(point(bias, high, loads) for bias, high, loads in rows)]
    bias = next_bias(points)
    assert bias is None or (bias > 0 and bias not in {known.bias for known in points})


# ---- the file


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return read_gguf(write_tiny(tmp_path / "tiny.gguf", TinySpec()))


def written(profile: QualityProfile, catalog: Catalog) -> Path:
    path = profile_paths(catalog, None)[0]
    replace(profile, fingerprint=catalog.fingerprint, model=catalog.path.name).write(path)
    return path


def test_a_profile_survives_its_file(measured: QualityProfile, catalog: Catalog) -> None:
    written(measured, catalog)
    found = find_profile(catalog, None, policy="lfu")
    assert found == replace(measured, fingerprint=catalog.fingerprint, model=catalog.path.name)


def test_another_memory_budget_on_the_same_texts_is_added_and_other_texts_replace_all() -> None:
    old = profile_of(point(0.0, 0.0, 9.0), point(0.2, 0.01, 5.0))
    new = profile_of(point(0.0, 0.0, 4.0, share=0.5), point(0.2, 0.02, 2.0, share=0.5))
    assert merged(old, new).shares == (0.25, 0.5)
    again = profile_of(point(0.0, 0.0, 8.0))
    assert merged(old, again).points == again.points
    assert merged(old, replace(new, text_digest="other")).shares == (0.5,)


def test_without_a_profile_the_command_that_makes_one_is_named(catalog: Catalog) -> None:
    with pytest.raises(QualityProfileError, match=r"expertier profile tiny.gguf --quality --text FILES"):
        find_profile(catalog, None)


def test_for_a_checkpoint_the_command_names_the_engine_that_runs_it(catalog: Catalog) -> None:
    with pytest.raises(QualityProfileError, match=r"expertier profile tiny\.gguf --quality --engine vllm --text FILES"):
        find_profile(replace(catalog, format="safetensors"), None)


def test_a_changed_number_is_noticed(measured: QualityProfile, catalog: Catalog) -> None:
    path = written(measured, catalog)
    data = json.loads(path.read_text())
    data["points"][-1]["increase"]["high"] = 0.0
    path.write_text(json.dumps(data))
    with pytest.raises(QualityProfileError, match="damaged"):
        find_profile(catalog, None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "expertier-quality/9"}'])
def test_another_file_in_its_place_is_refused(text: str, measured: QualityProfile, catalog: Catalog) -> None:
    path = written(measured, catalog)
    path.write_text(text)
    with pytest.raises(QualityProfileError, match="Make it again"):
        find_profile(catalog, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"fingerprint": "0" * 32}, "another model"), ({"version": "0.0.0"}, "measured by Expertier 0.0.0")],
)
def test_a_profile_of_something_else_is_refused(
    changes: dict[str, str], words: str, measured: QualityProfile, catalog: Catalog
) -> None:
    path = written(measured, catalog)
    replace(measured, **{"fingerprint": catalog.fingerprint, **changes}).write(path)
    with pytest.raises(QualityProfileError, match=words):
        find_profile(catalog, None)


def test_a_profile_of_another_policy_is_refused(measured: QualityProfile, catalog: Catalog) -> None:
    written(measured, catalog)
    with pytest.raises(QualityProfileError, match="policy lfu"):
        find_profile(catalog, None, policy="lru")


def test_the_proxy_says_what_the_texts_cost(measured: QualityProfile) -> None:
    import numpy as np

    for known in measured.points:
        if known.bias:
            assert measured.proxy.kl(np.array(known.substituted)) == pytest.approx(known.kl.middle, rel=0.5)


def test_a_part_of_the_layers_cannot_keep_a_percentage() -> None:
    virtual = VirtualExperts([0, 1], VirtualSettings(bias=0.0))
    keeper = QualityKeeper(ONE_PERCENT, profile_of(point(0.0, 0.005, 1.0)))
    with pytest.raises(QualityBudgetError, match="all 1 layers"):
        keeper.attach(virtual, lambda: 50, 100, definite=False)


def test_in_hard_mode_a_budget_that_is_not_covered_any_more_makes_the_model_exact_until_it_is() -> None:
    memory = [50]
    virtual = VirtualExperts([0], VirtualSettings(bias=math.inf))
    keeper = QualityKeeper(ONE_PERCENT, profile_of(point(0.0, 0.005, 1.0, share=0.5, hard=True)))
    keeper.attach(virtual, lambda: memory[0], 100, definite=True)
    assert virtual.bias == math.inf and "lossy" in keeper.words(virtual)
    memory[0] = 30
    virtual.end_step()
    assert not virtual.begin_step(1, "decode") and keeper.words(virtual).startswith("exact: ")
    assert describe_losses(virtual, keeper)["virtual"]["bias"] == 0.0
    memory[0] = 50
    virtual.end_step()
    assert virtual.begin_step(1, "decode") and "exact" not in keeper.words(virtual)
    assert describe_losses(virtual, keeper)["virtual"]["bias"] is None
