"""Teacher-forced evaluation against a model of which everything is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.comparison.prompts import Text
from expertier.errors import ExpertierError
from expertier.quality import Evaluation, Reference, evaluate, samples
from expertier.quality.evaluation import log_softmax
from expertier.quality.statistics import LEAST_TEXTS, bootstrap, student
from quality.sessions import TableSession


def measured(session: TableSession, bias: float = 0.0, count: int = 12) -> Evaluation:
    texts = samples(session, session.texts(count), count=count, tokens=60)
    session.set_virtual(0.0, 0)
    with Reference(session, texts) as reference:
        session.set_virtual(bias, 0)
        return evaluate(session, reference)


def test_a_mode_that_changes_nothing_has_a_divergence_of_exactly_zero() -> None:
    found = measured(TableSession())
    assert found.kl == 0.0
    assert found.agreement == 1.0
    assert found.cross_entropy == found.exact_cross_entropy
    assert found.perplexity_increase().high == 0.0
    assert not found.substituted.any()


def test_cross_entropy_is_that_of_the_table() -> None:
    session = TableSession()
    (text,) = samples(session, session.texts(1), count=1, tokens=60)
    with Reference(session, [text]) as reference:
        found = evaluate(session, reference)
    pairs = zip(text.tokens, text.tokens[1:], strict=False)
    expected = -sum(log_softmax(session.table[now])[after] for now, after in pairs)
    assert found.tokens == 59
    assert found.cross_entropy == pytest.approx(expected / 59)


def test_stand_ins_cost_perplexity_and_agreement_and_save_loads() -> None:
    exact, lossy = measured(TableSession()), measured(TableSession(), bias=2.0)
    assert lossy.kl > 0.001
    assert lossy.agreement < 1.0
    assert lossy.loads_per_token < exact.loads_per_token
    assert lossy.bytes_per_token == pytest.approx(10 * lossy.loads_per_token)
    increase = lossy.perplexity_increase()
    assert increase.low < increase.middle < increase.high
    # The text was written by the exact model, so what it loses is the divergence, but for the sample's noise.
    assert np.log1p(increase.low) < lossy.kl < np.log1p(increase.high)


def test_texts_are_taken_in_turns_over_the_domains() -> None:
    session = TableSession()
    texts = [Text(domain="a", text="abc"), Text(domain="a", text="abd"), Text(domain="b", text="xyz")]
    found = samples(session, texts, count=2, tokens=10)
    assert [sample.domain for sample in found] == ["a", "b"]


def test_texts_without_two_tokens_are_refused() -> None:
    session = TableSession()
    with pytest.raises(ExpertierError, match="two tokens"):
        samples(session, [Text(domain="a", text="x")], count=4, tokens=10)


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ExpertierError, match="not numbers"):
        log_softmax(np.array([0.0, np.nan], np.float32))


def test_an_interval_over_few_texts_promises_nothing() -> None:
    few = bootstrap(np.ones(LEAST_TEXTS - 1), np.ones(LEAST_TEXTS - 1))
    assert np.isinf(few.high)


def test_intervals_become_narrower_with_more_texts_and_wider_when_texts_differ() -> None:
    rng = np.random.default_rng(3)

    def width(count: int, spread: float) -> float:
        found = bootstrap(rng.normal(0, spread, count), np.ones(count))
        return found.high - found.low

    assert width(400, 1.0) < width(8, 1.0)
    assert width(50, 0.1) < width(50, 1.0)


@given(st.integers(4, 12), st.integers(0, 2**32 - 1))
def test_an_interval_contains_its_estimate(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = bootstrap(rng.normal(0, 1, count), rng.uniform(10, 100, count))
    assert found.low <= found.middle <= found.high


def test_upper_bounds_over_few_texts_hold_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(11)
    holds = [bootstrap(rng.normal(0, 1, 6), np.ones(6)).high >= 0 for _ in range(400)]
    assert np.mean(holds) > 0.92


@pytest.mark.parametrize(("freedom", "expected"), [(3, 2.353), (5, 2.015), (9, 1.833), (30, 1.697)])
def test_quantiles_of_students_distribution_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert student(freedom) == pytest.approx(expected, rel=0.01)
