"""Which experts stand in for absent ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.errors import RouterScoresError, VirtualExpertsError
from expertier.virtual import VirtualExperts, VirtualSettings, choose, close_groups, top_experts
from expertier.virtual.selection import choose_together

Case = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


@st.composite
def cases(draw: st.DrawFn, *, enough: bool = False) -> Case:
    """Scores with many ties, some experts closed, any residency, and the router's own choice."""
    tokens, experts = draw(st.integers(1, 5)), draw(st.integers(2, 24))
    top_k = draw(st.integers(1, min(8, experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = rng.integers(0, 9, (tokens, experts)) * np.float32(draw(st.sampled_from([0.0, 0.25, 3.7])))
    resident = rng.random(experts) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    if enough:
        resident[rng.permutation(experts)[:top_k]] = True
    else:
        for row in scores:
            row[rng.permutation(experts)[: rng.integers(0, experts - top_k + 1)]] = -np.inf
    return scores, resident, top_experts(scores, top_k)


def weights_of(scores: Any, routes: Any) -> Any:
    return np.take_along_axis(scores, routes, axis=1)


def pick(scores: Any, resident: Any, routes: Any, **settings: Any) -> Any:
    return choose(scores, resident, routes, weights_of(scores, routes), **settings)


def by_definition(scores: Any, resident: Any, routes: Any, bias: float, protect: int) -> list[set[int]]:
    """The top-k of raised scores, one token and one expert at a time; ties go to the router's choice."""
    chosen = []
    for row, true in zip(scores.astype(np.float64), routes.tolist(), strict=True):
        lift = bias * row[true].sum()
        raised = {expert: row[expert] + (lift if resident[expert] else 0.0) for expert in range(len(row))}
        raised.update(dict.fromkeys(true[:protect], math.inf))
        order = sorted(raised, key=lambda expert: (-raised[expert], expert not in true, -row[expert], expert))
        chosen.append({expert for expert in order[: len(true)]})
    return chosen


@given(cases(), st.sampled_from([0.03, 0.3, 1.0, 5.0]), st.integers(0, 3))
def test_a_choice_is_the_top_k_of_raised_scores(case: Case, bias: float, protect: int) -> None:
    scores, resident, routes = case
    chosen = pick(scores, resident, routes, bias=bias, protect=protect)
    values = [sorted(scores[row, sorted(ids)].tolist()) for row, ids in enumerate(by_definition(*case, bias, protect))]
    assert [sorted(scores[row, ids].tolist()) for row, ids in enumerate(chosen.tolist())] == values
    assert all(len(set(ids)) == len(ids) for ids in chosen.tolist())
    assert np.isin(chosen, np.flatnonzero(resident))[chosen != routes].all()
    assert (chosen[:, :protect] == routes[:, :protect]).all()
    assert not np.isneginf(np.take_along_axis(scores, chosen, 1)[chosen != routes]).any()


@given(cases(), st.sampled_from([0.03, 0.3, 1.0, 5.0]), st.integers(0, 3))
def test_what_one_token_brings_in_the_others_keep_and_nothing_more_is_loaded(
    case: Case, bias: float, protect: int
) -> None:
    scores, resident, routes = case
    weights = weights_of(scores, routes)
    alone = choose(scores, resident, routes, weights, bias=bias, protect=protect)
    together = choose_together(scores, resident, routes, weights, bias=bias, protect=protect)
    brought = np.setdiff1d(alone, np.flatnonzero(resident))
    assert np.isin(np.setdiff1d(together, np.flatnonzero(resident)), brought).all()
    assert not ((together != routes) & (alone == routes)).any()
    assert not np.isin(routes[together != routes], brought).any()
    assert all(len(set(ids)) == len(ids) for ids in together.tolist())


@given(cases())
def test_without_bias_the_choice_is_the_router_s_own_object(case: Case) -> None:
    scores, resident, routes = case
    assert pick(scores, resident, routes, bias=0) is routes


@given(cases(), st.floats(0.01, 10))
def test_experts_that_are_all_resident_are_kept_in_their_order(case: Case, bias: float) -> None:
    scores, _, routes = case
    assert pick(scores, np.ones(scores.shape[1], bool), routes, bias=bias) is routes


@given(cases(enough=True))
def test_an_infinite_bias_is_a_mask_over_resident_experts(case: Case) -> None:
    scores, resident, routes = case
    chosen = pick(scores, resident, routes, bias=math.inf)
    assert resident[chosen].all()
    masked = np.where(resident, scores, -np.inf)
    expected = np.take_along_axis(masked, top_experts(masked, routes.shape[1]), 1)
    assert (np.sort(weights_of(scores, chosen), 1) == np.sort(expected, 1)).all()


@given(cases(), st.floats(0.01, 2), st.floats(0.01, 2))
def test_a_higher_bias_never_loads_more(case: Case, one: float, other: float) -> None:
    scores, resident, routes = case
    loads = [
        (~resident[pick(scores, resident, routes, bias=bias)]).sum(axis=1)
        for bias in (min(one, other), max(one, other))
    ]
    assert (loads[0] >= loads[1]).all()


@given(cases(), st.floats(0.01, 2))
def test_a_batch_is_chosen_as_its_tokens_would_be(case: Case, bias: float) -> None:
    scores, resident, routes = case
    alone = [pick(scores[i : i + 1], resident, routes[i : i + 1], bias=bias) for i in range(len(scores))]
    assert (pick(scores, resident, routes, bias=bias) == np.concatenate(alone)).all()


def test_stand_ins_come_from_open_groups_only() -> None:
    scores = np.array([[9.0, 1.0, 8.0, 7.0, 5.0, 5.5, 0.0, 0.0]], np.float32)
    assert np.flatnonzero(np.isfinite(close_groups(scores, groups=4, kept=2)[0])).tolist() == [2, 3, 4, 5]
    by_best = close_groups(scores, groups=4, kept=2, rank_by="max")
    assert np.flatnonzero(np.isfinite(by_best[0])).tolist() == [0, 1, 2, 3]
    resident = np.array([1, 1, 0, 0, 1, 1, 1, 1], bool)
    closed = close_groups(scores, groups=4, kept=2)
    assert set(pick(closed, resident, top_experts(closed, 2), bias=5.0)[0].tolist()) == {4, 5}


def test_a_stand_in_loses_no_more_than_the_bias_of_a_token_s_gate_weight() -> None:
    scores = np.array([[0.4, 0.3, 0.21, 0.05, 0.04]])  # 0.09 of 0.7 would be lost
    routes, resident = np.array([[0, 1]]), np.array([True, False, True, True, True])
    assert pick(scores, resident, routes, bias=0.12).tolist() == [[0, 1]]
    assert pick(scores, resident, routes, bias=0.13).tolist() == [[0, 2]]


def test_a_correction_counts_for_the_rank_and_not_for_the_weight() -> None:
    probabilities = np.array([[0.4, 0.3, 0.2, 0.1]])
    corrected = probabilities + np.array([0.0, 0.5, 0.5, 0.5])
    routes, resident = np.array([[1, 2]]), np.array([True, False, True, True])
    chosen = [
        choose(corrected, resident, routes, weights_of(probabilities, routes), bias=bias).tolist()
        for bias in (0.35, 0.45)  # of 0.5; 0.2 is between the corrected scores
    ]
    assert chosen == [[[1, 2]], [[3, 2]]]


def test_scores_that_are_not_numbers_are_refused() -> None:
    scores = np.array([[1.0, np.nan, 0.0]], np.float32)
    with pytest.raises(RouterScoresError, match="NaN"):
        pick(scores, np.zeros(3, bool), np.array([[0]]), bias=0.1)


def test_fewer_resident_experts_than_a_token_needs_are_refused_under_an_infinite_bias() -> None:
    with pytest.raises(VirtualExpertsError, match="Only 1 experts are resident where a token needs 2"):
        pick(np.zeros((1, 4), np.float32), np.arange(4) == 3, np.array([[0, 1]]), bias=math.inf)


# ---- the object an adapter holds


def virtual(bias: float = 0.5, **more: Any) -> VirtualExperts:
    return VirtualExperts([1, 3], VirtualSettings(bias=bias, **more))


SCORES = np.array([[0.6, 0.2, 0.15, 0.05], [0.0, 0.0, 0.1, 0.9]], np.float32)
ROUTES = np.array([[0, 1], [3, 2]])
WEIGHTS = np.array([[0.6, 0.2], [0.9, 0.1]], np.float32)
RESIDENT = np.array([True, False, True, True])


def test_what_is_replaced_is_counted_with_its_share_of_the_gate_weights() -> None:
    experts = virtual()
    assert experts.begin_step(2, "decode")
    assert experts.choose(3, ROUTES, RESIDENT, lambda: (SCORES, WEIGHTS)).tolist() == [[0, 2], [3, 2]]
    stats = experts.stats()
    assert (stats.tokens, stats.exact_tokens, stats.layers) == (2, 0, (1, 3))
    assert stats.substituted_share == (0.0, 0.25)
    assert stats.substituted_mass == pytest.approx((0.0, 0.125))


def test_the_router_s_scores_are_not_asked_for_while_everything_is_resident() -> None:
    experts = virtual()
    experts.begin_step(2, "decode")
    assert experts.choose(1, ROUTES, np.ones(4, bool), lambda: pytest.fail("asked")) is ROUTES


def test_prompts_and_requests_that_ask_for_it_are_exact() -> None:
    experts = virtual()
    assert not experts.begin_step(7, "prefill")
    with experts.exactly():
        assert not experts.begin_step(1, "decode")
        assert experts.choose(1, ROUTES, RESIDENT, lambda: pytest.fail("asked")) is ROUTES
    assert experts.begin_step(1, "decode")
    assert (experts.tokens, experts.exact_tokens) == (1, 8)
    assert virtual(prefill=True).begin_step(7, "prefill")


def test_exact_tokens_of_a_batch_are_counted_apart() -> None:
    experts = virtual()
    assert experts.begin_step(3, "decode", exact=2)
    assert (experts.tokens, experts.exact_tokens) == (1, 2)
    assert not experts.begin_step(2, "decode", exact=2)
    assert (experts.tokens, experts.exact_tokens) == (1, 4)


def test_the_bias_is_live_and_who_steers_it_is_called_after_every_step() -> None:
    experts = virtual()
    experts.after_step = lambda told: setattr(told, "bias", told.bias / 2)
    experts.begin_step(1, "decode")
    experts.end_step()
    assert experts.bias == 0.25
    experts.bias = 0
    assert not experts.begin_step(1, "decode")


@pytest.mark.parametrize("bias", [-0.1, math.nan, math.inf])
def test_a_bias_that_cannot_be_is_refused(bias: float) -> None:
    with pytest.raises(VirtualExpertsError, match="bias"):
        virtual().bias = bias
