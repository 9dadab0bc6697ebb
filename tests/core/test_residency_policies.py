"""Eviction policies against what they are on paper, and how they do behind the real manager."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from expertier.errors import UnsupportedOptionError
from expertier.residency import POLICIES, EvictionPolicy, make_policy
from expertier.residency.base import ExpertSpace
from support.fake_engine import fake_engine, uniform

LAYERS, EXPERTS = 3, 6
SPACE = ExpertSpace(layer_of=np.repeat(np.arange(LAYERS), EXPERTS), layers=LAYERS)
ALL = np.arange(len(SPACE))

# What one step uses: tokens, and for every layer the experts of each token.
STEPS = st.lists(
    st.integers(1, 4).flatmap(
        lambda tokens: st.lists(
            st.lists(st.permutations(range(EXPERTS)).map(lambda order: order[:2]), min_size=tokens, max_size=tokens),
            min_size=LAYERS,
            max_size=LAYERS,
        )
    ),
    min_size=1,
    max_size=12,
)
Steps = list[list[list[list[int]]]]


def replay(policy: EvictionPolicy, steps: Steps) -> list[tuple[int, int, int]]:
    """Show the steps to a policy; return every use as ``(token, layer, expert number)`` with tokens from 1."""
    uses = []
    now = 0
    for layers in steps:
        tokens = len(layers[0])
        policy.advance(tokens)
        now += tokens
        for layer, routes in enumerate(layers):
            table = np.array(routes)
            flat = table.ravel() + layer * EXPERTS
            ages = None if tokens == 1 else np.repeat(np.arange(tokens - 1, -1, -1.0), table.shape[1])
            policy.touch(flat, ages)
            for token, route in enumerate(routes):
                uses += [(now - tokens + 1 + token, layer, layer * EXPERTS + expert) for expert in route]
    return uses


def now_of(steps: Steps) -> int:
    return sum(len(layers[0]) for layers in steps)


@given(steps=STEPS)
@settings(max_examples=60, deadline=None)
def test_lru_ranks_by_the_last_token_and_within_it_by_layer(steps: Steps) -> None:
    policy = make_policy("lru", SPACE)
    last: dict[int, tuple[int, int]] = {}
    for token, layer, expert in replay(policy, steps):
        last[expert] = max(last.get(expert, (0, 0)), (token, layer))
    never = (-1, -1)
    scores = policy.keep_scores(ALL, 0)
    for one in ALL.tolist():
        for other in ALL.tolist():
            assert (scores[one] < scores[other]) == (last.get(one, never) < last.get(other, never))


def decayed(uses: list[tuple[int, int, int]], now: int, half_life: float) -> NDArray[np.float64]:
    sums = np.zeros(len(SPACE))
    for token, _, expert in uses:
        sums[expert] += 0.5 ** ((now - token) / half_life)
    return sums


@given(steps=STEPS, half_life=st.sampled_from([0.01, 0.05, 1.0, 16.0, 300.0]))
@settings(max_examples=60, deadline=None)
def test_lfu_is_the_sum_of_uses_that_halve_with_age(steps: Steps, half_life: float) -> None:
    # Half-lives far below a token make the growing weights overflow their range within a few steps.
    policy = make_policy("lfu", SPACE, half_life=half_life)
    sums = decayed(replay(policy, steps), now_of(steps), half_life)
    found = policy.keep_scores(ALL, 1)
    np.testing.assert_allclose(found / found.max(), sums / sums.max(), rtol=1e-9, atol=1e-12)
    steady = 1 - 0.5 ** (1 / half_life)
    np.testing.assert_allclose(policy.use_probability(ALL), np.minimum(sums * steady, 1), rtol=1e-9, atol=1e-12)


def test_lfu_stays_exact_over_many_rescalings() -> None:
    dice = np.random.default_rng(0)
    policy = make_policy("lfu", SPACE, half_life=2.0)
    uses = []
    for token in range(5000):
        policy.advance(1)
        experts = dice.permutation(len(SPACE))[:3]
        policy.touch(experts)
        uses += [(token, 0, int(expert)) for expert in experts]
    sums = decayed(uses[-600:], 4999, 2.0)
    np.testing.assert_allclose(policy.use_probability(ALL), sums * (1 - 0.5**0.5), rtol=1e-9)
    policy.advance(10**7)
    assert not policy.use_probability(ALL).any()
    policy.touch(np.array([4]))
    assert policy.keep_scores(ALL, 0).argmax() == 4


def test_lfu_learns_how_often_an_expert_is_used() -> None:
    dice = np.random.default_rng(0)
    policy = make_policy("lfu", SPACE, half_life=400.0)
    rates = np.linspace(0.05, 0.95, len(SPACE))
    for _ in range(6000):
        policy.advance(1)
        policy.touch(np.flatnonzero(dice.random(len(SPACE)) < rates))
    np.testing.assert_allclose(policy.use_probability(ALL), rates, atol=0.1)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(steps=STEPS)
@settings(max_examples=25, deadline=None)
def test_a_step_of_many_tokens_leaves_the_same_ranking_as_its_tokens_one_by_one(name: str, steps: Steps) -> None:
    together, apart = make_policy(name, SPACE), make_policy(name, SPACE)
    replay(together, steps)
    singles = [[[layer[token]] for layer in layers] for layers in steps for token in range(len(layers[0]))]
    replay(apart, singles)
    for layer in range(LAYERS):
        np.testing.assert_allclose(together.keep_scores(ALL, layer), apart.keep_scores(ALL, layer), rtol=1e-9)
    np.testing.assert_allclose(together.use_probability(ALL), apart.use_probability(ALL), rtol=1e-9)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(steps=STEPS, extra=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_chances_are_between_nothing_and_certainty(name: str, steps: Steps, extra: int) -> None:
    policy = make_policy(name, SPACE)
    with np.errstate(all="raise", under="ignore"):
        for moment in range(3):
            chances = policy.use_probability(ALL)
            assert chances.shape == ALL.shape
            assert ((chances >= 0) & (chances <= 1)).all()
            for layer in range(LAYERS):
                assert not np.isnan(policy.keep_scores(ALL, layer)).any()
            if moment == 0:
                replay(policy, steps)
            else:
                policy.advance(extra)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_asking_changes_nothing(name: str) -> None:
    policy = make_policy(name, SPACE)
    policy.advance(1)
    policy.touch(np.array([1, 7]))
    before = policy.use_probability(ALL).copy()
    policy.use_probability(ALL)[:] = 7
    policy.keep_scores(ALL, 2)[:] = 7
    np.testing.assert_array_equal(policy.use_probability(ALL), before)


def test_edge_gives_up_the_layer_whose_turn_is_furthest_away() -> None:
    policy = make_policy("edge", SPACE)
    policy.advance(1)
    policy.touch(ALL)
    first = np.array([layer * EXPERTS for layer in range(LAYERS)])
    with np.errstate(all="raise"):
        for current in range(LAYERS):
            scores = policy.keep_scores(first, current)
            # Ring order: the current layer and the next stay, the one that has just run goes first.
            assert scores[current] == scores[(current + 1) % LAYERS]
            assert scores.argmin() == (current - 1) % LAYERS


def test_edge_keeps_a_frequent_expert_of_a_far_layer_over_a_rare_one_of_a_near_layer() -> None:
    policy = make_policy("edge", SPACE)
    for _ in range(10):
        policy.advance(1)
        policy.touch(np.array([2 * EXPERTS]))
    policy.touch(np.array([EXPERTS]))
    far, near = policy.keep_scores(np.array([2 * EXPERTS, EXPERTS]), 0)
    assert far > near


def test_lfru_weighs_frequency_with_recency() -> None:
    policy = make_policy("lfru", SPACE, half_life=1e6)
    for _ in range(4):
        policy.advance(1)
        policy.touch(np.array([0, 1]))
    policy.advance(1)
    policy.touch(np.array([1, 2]))
    often_then_not, often_and_now, once_now, never = policy.keep_scores(np.array([0, 1, 2, 3]), 0)
    assert often_and_now > often_then_not > once_now > never == 0
    policy.advance(10)
    policy.touch(np.array([2]))
    assert policy.keep_scores(np.array([2]), 0) > policy.keep_scores(np.array([0]), 0)


def test_unknown_policies_and_meaningless_settings_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"no eviction policy 'best'.*lru.*lfu"):
        make_policy("best", SPACE)
    for name in ("lru", "edge"):
        with pytest.raises(UnsupportedOptionError, match=f"'{name}' has no half-life"):
            make_policy(name, SPACE, half_life=4.0)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_carries_the_name_it_is_registered_by(name: str) -> None:
    assert make_policy(name, SPACE).name == name
    assert len(SPACE) == LAYERS * EXPERTS


def test_lfu_loads_less_than_lru_when_some_experts_are_used_more_than_others(tmp_path: Path) -> None:
    shapes = uniform(3, 16)
    misses = {}
    for policy in ("lru", "lfu"):
        dice = np.random.default_rng(1)
        popularity = np.stack([dice.permutation(np.arange(1, 17.0) ** -1.2) for _ in shapes])
        with fake_engine(tmp_path, shapes, 16 * shapes[0].slot_bytes, policy=policy) as engine:
            for _ in range(150):
                engine.step(
                    {
                        layer: [dice.choice(16, 2, replace=False, p=popularity[layer] / popularity[layer].sum())]
                        for layer in shapes
                    }
                )
            misses[policy] = engine.manager.stats().decode.misses
    assert misses["lfu"] < 0.9 * misses["lru"], misses
