"""The predictive policy: what a forecast changes, and that a bad one changes nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from expertier.residency import make_policy
from expertier.residency.base import ExpertSpace
from expertier.residency.predictive import Predictive
from expertier.routing.predictor import HORIZONS, Forecast
from support.fake_engine import LayerShape, fake_engine, uniform

LAYERS, EXPERTS = 4, 16
SPACE = ExpertSpace(layer_of=np.repeat(np.arange(LAYERS), EXPERTS), layers=LAYERS)
ALL = np.arange(len(SPACE))
NOTHING = np.zeros((len(HORIZONS), len(SPACE)))
Vector = NDArray[np.float64]


def chances(*likely: int, rest: float = 0.02) -> Vector:
    result = np.full(len(SPACE), rest)
    result[list(likely)] = 0.9
    return result


def expert(layer: int, index: int) -> int:
    return layer * EXPERTS + index


def test_what_this_step_will_use_stays_until_its_layer_has_passed() -> None:
    policy = Predictive(SPACE)
    wanted, other, unused = expert(2, 5), expert(2, 6), expert(1, 3)
    policy.expect(chances(wanted, unused), NOTHING)
    policy.advance(1)
    policy.touch(np.array([expert(0, 0)]))
    before = policy.keep_scores(ALL, 0)
    assert before[wanted] > 5 * before[other]
    assert before[unused] > before[wanted], "its layer comes first"
    policy.touch(np.array([expert(1, 0)]))
    after = policy.keep_scores(ALL, 1)
    assert after[wanted] == before[wanted]
    assert after[unused] < after[other], "predicted, not used, and a token away"


@pytest.mark.parametrize("horizon", range(len(HORIZONS)))
def test_what_the_next_tokens_will_use_stays_and_the_sooner_the_longer(horizon: int) -> None:
    policy = Predictive(SPACE)
    sooner, later, never = expert(1, 1), expert(1, 2), expert(1, 3)
    soon = np.full_like(NOTHING, 0.02)
    soon[horizon:, sooner] = 0.9
    soon[horizon + 1 :, later] = 0.9
    policy.expect(chances(), soon)
    policy.advance(1)
    for layer in range(LAYERS):
        policy.touch(np.array([expert(layer, 0)]))
    scores = policy.keep_scores(ALL, 3)
    assert scores[sooner] > scores[later] >= scores[never]


def test_without_forecasts_the_likelier_stays_and_among_equals_the_one_whose_turn_is_sooner() -> None:
    policy = make_policy("predictive", SPACE)
    for step in range(30):
        policy.advance(1)
        for layer in range(LAYERS):
            policy.touch(np.array([expert(layer, 0), expert(layer, 1 + step % 2)]))
    scores = policy.keep_scores(ALL, LAYERS - 1).reshape(LAYERS, EXPERTS)
    assert (scores[:, 0] > scores[:, 1]).all()
    assert (scores[:, 1] > scores[:, 3]).all()
    assert (np.diff(scores[:, 0]) < 0).all()
    policy.advance(1)
    policy.touch(np.array([expert(0, 0)]))
    scores = policy.keep_scores(ALL, 0).reshape(LAYERS, EXPERTS)
    assert scores[1, 0] > scores[2, 0] > scores[3, 0] > scores[0, 0], "the layer that has passed waits longest"


def rounds(policy: Predictive, steps: int, *, reverse: bool, forecast: bool = True) -> Vector:
    """Steps that use two experts of each layer, different ones every time, all of them forecast; scores at the end."""
    dice = np.random.default_rng(3)
    uses = [[dice.choice(EXPERTS, 2, replace=False) for _ in range(LAYERS)] for _ in range(steps + 1)]
    for now, following in itertools.pairwise(uses):
        said = [
            chances(*(expert(layer, int(index)) for layer in range(LAYERS) for index in step[layer]))
            for step in (now, following)
        ]
        if reverse:
            said = [1.0 - one for one in said]
        if forecast:
            policy.expect(said[0], np.stack([said[1]] * len(HORIZONS)))
        policy.advance(1)
        for layer in range(LAYERS):
            policy.touch(now[layer] + layer * EXPERTS)
    scores: Vector = policy.keep_scores(ALL, LAYERS - 1)
    return scores


def test_a_forecast_that_is_worse_than_the_past_is_left_out_within_two_steps() -> None:
    alone = rounds(Predictive(SPACE), 3, reverse=False, forecast=False)
    reversed_scores = rounds(Predictive(SPACE), 3, reverse=True)
    np.testing.assert_allclose(reversed_scores, alone)
    assert not np.allclose(rounds(Predictive(SPACE), 3, reverse=False), alone)


def test_a_forecast_that_turns_good_is_listened_to_again() -> None:
    policy = Predictive(SPACE)
    rounds(policy, 40, reverse=True)
    rounds(policy, 60, reverse=False)
    policy.expect(chances(expert(2, 5)), NOTHING)
    assert policy.use_probability(np.array([expert(2, 5)])) == pytest.approx(0.9)


@pytest.mark.parametrize("where", ["now", "soon"])
def test_what_is_no_number_is_no_forecast(where: str) -> None:
    policy = Predictive(SPACE)
    now, soon = chances(expert(2, 5)), NOTHING.copy()
    (now if where == "now" else soon[1])[7] = np.nan
    assert policy.expect(chances(expert(2, 5)), NOTHING)
    assert not policy.expect(now, soon)
    policy.advance(1)
    policy.touch(np.array([expert(0, 0)]))
    assert np.isfinite(policy.keep_scores(ALL, 0)).all()
    assert policy.use_probability(np.array([expert(2, 5)])) == 0
    policy.advance(1)
    assert policy.expect(chances(expert(2, 5)), NOTHING), "the next one counts again"


def test_a_forecast_holds_for_one_step_whether_it_comes_before_or_at_its_beginning() -> None:
    likely = np.array([expert(2, 5)])
    early, late = Predictive(SPACE), Predictive(SPACE)
    early.expect(chances(*likely), NOTHING)
    early.advance(1)
    late.advance(1)
    late.expect(chances(*likely), NOTHING)
    for policy in (early, late):
        assert policy.use_probability(likely) == pytest.approx(0.9)
        policy.touch(np.array([expert(0, 0)]))
        assert policy.use_probability(likely) == pytest.approx(0.9)
        policy.advance(1)
        assert policy.use_probability(likely) == 0


def test_the_manager_hands_a_forecast_to_the_policy_expert_by_expert(tmp_path: Path) -> None:
    shapes = {3: LayerShape(experts=6, top_k=2), 5: LayerShape(experts=4, top_k=2)}
    with fake_engine(tmp_path, shapes, 7 * shapes[3].slot_bytes, policy="predictive") as engine:
        engine.step({3: [[0, 1]], 5: [[0, 1]]})
        engine.step({3: [[2, 3]], 5: [[2]]})
        now = np.zeros((2, 6), np.float32)
        now[0, [4, 5]] = now[1, [0, 1]] = 0.95
        engine.manager.forecast(Forecast(now=now, soon=np.zeros((3, 2, 6), np.float32)))
        engine.step({3: [[4, 5]], 5: [[0, 1]]})
        stats = engine.manager.stats()
        assert stats.decode.misses == 4 + 3 + 2, "what layer 5 was going to use made no room for layer 3"


def test_a_policy_that_does_not_look_ahead_is_handed_nothing(tmp_path: Path) -> None:
    shapes = uniform(2, 4)
    with fake_engine(tmp_path, shapes, 8 * shapes[0].slot_bytes, policy="lfu") as engine:
        engine.manager.forecast(Forecast(now=np.ones((2, 4), np.float32), soon=np.ones((3, 2, 4), np.float32)))
        engine.step({0: [[0, 1]], 1: [[2, 3]]})
        assert engine.manager.stats().decode.misses == 4
