"""Which loads begin, in which order, and how far a predictor is believed about them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.routing.gate import Confidence
from expertier.routing.prefetch_plan import DOUBTFUL_CHANCE, LEAST_CHANCE, plan_loads

LAYERS, EXPERTS = 3, 8


@given(seed=st.integers(0, 10_000), most=st.integers(-2, 30), least=st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_loads_are_absent_likely_few_and_in_the_order_of_need(seed: int, most: int, least: float) -> None:
    dice = np.random.default_rng(seed)
    chances, absent = dice.random((LAYERS, EXPERTS)), dice.random((LAYERS, EXPERTS)) < 0.5
    rows, experts = plan_loads(chances, absent, most=most, least=least)
    wanted = absent & (chances >= least)
    assert len(rows) == min(max(most, 0), wanted.sum())
    assert wanted[rows, experts].all()
    order = list(zip(rows.tolist(), (-chances[rows, experts]).tolist(), strict=True))
    assert order == sorted(order)
    left = wanted.copy()
    left[rows, experts] = False
    if len(rows) and left.any():
        assert not left[: rows[-1]].any(), "an earlier layer was left out for a later one"


@given(seed=st.integers(0, 10_000), most=st.integers(0, 30), doubtful=st.integers(-2, 6))
@settings(max_examples=60, deadline=None)
def test_what_is_doubtful_follows_only_where_too_little_is_likely(seed: int, most: int, doubtful: int) -> None:
    dice = np.random.default_rng(seed)
    chances, absent = dice.random((LAYERS, EXPERTS)), dice.random((LAYERS, EXPERTS)) < 0.3
    likely = list(zip(*plan_loads(chances, absent, most=most), strict=True))
    found = list(zip(*plan_loads(chances, absent, most=most, doubtful=doubtful), strict=True))
    assert found[: len(likely)] == likely
    rest = absent & (chances >= DOUBTFUL_CHANCE) & (chances < LEAST_CHANCE)
    assert len(found) == max(len(likely), min(doubtful, most, len(likely) + int(rest.sum())))
    added = [float(chances[cell]) for cell in found[len(likely) :]]
    assert added == sorted(chances[rest].tolist(), reverse=True)[: len(added)]


def settled(confidence: Confidence, chance: float, used: float, steps: int, layer: int = 1) -> None:
    """Steps that load one expert ahead by a chance, which is used in a share of them."""
    for step in range(steps):
        confidence.begun(layer, np.array([3]), np.array([chance]))
        hit = int((step + 1) * used) > int(step * used)
        for row in range(LAYERS):
            confidence.settle(row, np.array([[3 if hit and row == layer else 5, 6]]))


def test_a_predictor_that_keeps_its_word_is_believed() -> None:
    confidence = Confidence(LAYERS, EXPERTS)
    assert confidence.factor().tolist() == [[1.0]] * LAYERS
    settled(confidence, 0.8, 0.8, 400)
    assert confidence.factor()[:, 0] == pytest.approx([1, 1, 1], abs=0.03)


def test_a_layer_that_promises_too_much_is_narrowed_and_the_others_are_not() -> None:
    confidence = Confidence(LAYERS, EXPERTS)
    settled(confidence, 0.9, 0.3, 400)
    assert confidence.factor()[:, 0] == pytest.approx([1, 1 / 3, 1], abs=0.03)
    assert confidence.factor(1).shape == (2, 1)


def test_one_that_promises_too_little_is_widened_within_bounds() -> None:
    confidence = Confidence(LAYERS, EXPERTS)
    settled(confidence, 0.5, 1.0, 400)
    assert confidence.factor()[1, 0] == 1.25


def test_one_that_is_always_wrong_is_soon_not_believed_and_after_a_while_tried_again() -> None:
    confidence = Confidence(LAYERS, EXPERTS)
    settled(confidence, 0.95, 0.0, 3)
    assert 0.95 * confidence.factor()[1, 0] < 0.5
    for _ in range(2000):
        confidence.settle(1, np.array([[5, 6]]))
    assert confidence.factor()[1, 0] == pytest.approx(1.0, abs=0.01)
