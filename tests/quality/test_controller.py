"""The controller against simulated text: what it promises, whatever the text does."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.quality.controller import QualityController
from expertier.quality.proxy import Proxy

LAYERS = 4
PROXY = Proxy(weights=(1.0,) * LAYERS, scale=0.1, power=1.0, spread=0.0, rows=100)
INCREASE = 0.01
ALLOWED = float(np.log1p(INCREASE))
BIAS = 0.2


class Text:
    """Stand-ins take gate mass in proportion to the bias; `cost` is the divergence at the calibrated bias."""

    def __init__(self, cost: float, *, noise: float = 0.0, curve: float = 1.0, seed: int = 0) -> None:
        self.bias = BIAS
        self.tokens = self.exact_tokens = 0
        self.mass = np.zeros(LAYERS)
        self.cost, self.noise, self.curve = cost, noise, curve
        self._rng = np.random.default_rng(seed)

    def divergence(self) -> float:
        return self.cost * (self.bias / BIAS) ** self.curve

    def decode(self, controller: QualityController, tokens: int) -> float:
        """Divergence per token spent."""
        spent = 0.0
        for _ in range(tokens):
            if not self.bias:
                self.exact_tokens += 1
            else:
                now = self.divergence() * (self._rng.gamma(1 / self.noise, self.noise) if self.noise else 1.0)
                spent += now
                self.tokens += 1
                self.mass += now / 0.1 / LAYERS
            controller(self)
        return spent / tokens


def controller() -> QualityController:
    return QualityController(PROXY, increase=INCREASE, bias=BIAS)


def test_text_within_the_budget_is_left_alone() -> None:
    text, steering = Text(0.6 * ALLOWED, noise=1.0), controller()
    text.decode(steering, 4000)
    assert text.bias == BIAS
    found = steering.stats(text)
    assert found.back_offs == 0
    assert found.spent_kl == pytest.approx(0.6 * ALLOWED, rel=0.1)


@given(st.floats(1.2, 50.0), st.floats(0.5, 3.0))
@settings(deadline=None)
def test_text_that_costs_more_makes_the_bias_back_off_within_256_tokens(excess: float, curve: float) -> None:
    text, steering = Text(0.6 * ALLOWED, curve=curve), controller()
    text.decode(steering, 1000)
    text.cost = excess * ALLOWED
    text.decode(steering, 256)
    assert text.bias < BIAS


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 600)), max_size=6), st.floats(0.7, 2.0))
@settings(deadline=None)
def test_in_the_long_run_no_text_costs_more_than_the_budget(parts: list[tuple[float, int]], curve: float) -> None:
    text, steering = Text(0.0, curve=curve), controller()
    for cost, tokens in [*parts, (20.0, 800)]:
        text.cost = cost * ALLOWED
        text.decode(steering, tokens)
    assert text.decode(steering, 2000) <= 1.1 * ALLOWED
    assert 0 <= text.bias <= BIAS


def test_a_text_of_another_kind_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    text, steering = Text(0.6 * ALLOWED), controller()
    with caplog.at_level(logging.WARNING, "expertier"):
        text.decode(steering, 500)
        assert not caplog.records
        text.cost = 8 * ALLOWED
        text.decode(steering, 2000)
    (record,) = caplog.records
    assert "Quality budget" in record.message
    assert "1.0 % are allowed" in record.message
    assert steering.stats(text).back_offs >= 2


def test_the_bias_returns_slowly_to_its_calibrated_value_and_not_beyond() -> None:
    text, steering = Text(20 * ALLOWED), controller()
    text.decode(steering, 400)
    low = text.bias
    text.cost = 0.3 * ALLOWED
    text.decode(steering, 256)
    assert low <= text.bias < 1.5 * max(low, 0.01)
    text.decode(steering, 20_000)
    assert text.bias == BIAS


def test_where_even_the_least_bias_costs_too_much_the_model_is_exact_and_tries_again() -> None:
    text, steering = Text(0.0), controller()
    text.divergence = lambda: 50 * ALLOWED  # type: ignore[method-assign]
    text.decode(steering, 1000)
    assert text.exact_tokens > 500
    assert steering.stats(text).bias <= 0.01
    text.divergence = lambda: 0.1 * ALLOWED  # type: ignore[method-assign]
    text.decode(steering, 20_000)
    assert text.bias == BIAS


def test_another_memory_budget_brings_another_calibrated_bias() -> None:
    text, steering = Text(0.5 * ALLOWED), controller()
    text.decode(steering, 100)
    steering.covers(text, 0.05)
    assert text.bias == 0.05
    text.decode(steering, 2000)
    assert text.bias == 0.05


def test_a_memory_budget_that_nothing_is_known_of_forgets_no_backing_off() -> None:
    text, steering = Text(10 * ALLOWED), controller()
    text.decode(steering, 400)
    low = text.bias
    assert low < BIAS
    steering.covers(text, 0.0)
    assert text.bias == 0.0
    steering.covers(text, BIAS)
    assert text.bias == pytest.approx(low)
