"""The lookahead predictor on gates small enough to know the answer, and the gate that turns it off."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from expertier.routing import GainGate, Lookahead

HIDDEN = 8
EXPERTS = 6
NONE = np.zeros(EXPERTS, bool)
ONES = np.ones(HIDDEN, np.float32)
Vector = NDArray[np.float32]


def gates(layers: tuple[int, ...] = (2, 3, 7), experts: int = EXPERTS) -> dict[int, Vector]:
    dice = np.random.default_rng(0)
    return {layer: dice.standard_normal((experts, HIDDEN)).astype(np.float32) for layer in layers}


def lookahead_on(weights: dict[int, Vector], norms: dict[int, Vector] | None = None) -> Lookahead:
    return Lookahead(gates=weights, norms=norms or {}, top_k=dict.fromkeys(weights, 2))


def best(weights: Vector, hidden: Vector) -> list[int]:
    """The four likeliest: twice the two that each token uses."""
    return np.argsort(-(weights @ hidden))[:4].tolist()


def test_the_next_layers_gate_is_applied_to_this_layers_input() -> None:
    weights = gates()
    hidden = np.random.default_rng(1).standard_normal(HIDDEN).astype(np.float32)
    experts, chances = lookahead_on(weights).predict(2, hidden, NONE)
    assert experts.tolist() == best(weights[3], hidden)
    assert experts.dtype == np.int64
    assert chances.tolist() == [0.5] * 4


def test_this_layers_norm_is_divided_out_and_the_next_ones_applied() -> None:
    weights = gates()
    dice = np.random.default_rng(2)
    norms = {layer: dice.uniform(0.5, 2, HIDDEN).astype(np.float32) for layer in weights}
    residual = dice.standard_normal(HIDDEN).astype(np.float32)
    experts, _ = lookahead_on(weights, norms).predict(3, residual * norms[3], NONE)
    assert experts.tolist() == best(weights[7], residual * norms[7])


def test_a_norm_weight_of_zero_or_a_missing_norm_is_no_error() -> None:
    weights = gates()
    norms = {2: np.zeros(HIDDEN, np.float32), 3: ONES}
    with np.errstate(all="raise"):
        lookahead = lookahead_on(weights, norms)
    assert lookahead.predict(2, ONES, NONE)[0].tolist() == best(weights[3], ONES)
    assert lookahead.predict(3, ONES, NONE)[0].tolist() == best(weights[7], ONES)


def test_layers_are_followed_in_order_and_the_last_by_none() -> None:
    assert [lookahead_on(gates()).following(layer) for layer in (2, 3, 7, 5)] == [3, 7, None, None]


def test_only_absent_experts_are_candidates_and_keep_their_rank() -> None:
    weights = gates()
    lookahead = lookahead_on(weights)
    ranking = best(weights[3], ONES)
    resident = np.zeros(EXPERTS, bool)
    resident[[ranking[0], ranking[2]]] = True
    for _ in range(300):
        experts, chances = lookahead.predict(2, ONES, resident)
        assert experts.tolist() == [ranking[1], ranking[3]]
        lookahead.learn(3, np.array([ranking[0], ranking[1]]))
    assert chances == pytest.approx([1.0, 0.0], abs=0.01)
    assert lookahead.precision(3)[[0, 2]].tolist() == [0.5, 0.5], "what was resident teaches nothing"
    nothing, no_chances = lookahead.predict(2, ONES, np.ones(EXPERTS, bool))
    assert len(nothing) == len(no_chances) == 0
    lookahead.learn(3, np.array([0, 1]))


def test_there_are_never_more_candidates_than_experts() -> None:
    lookahead = lookahead_on(gates(experts=3))
    experts, chances = lookahead.predict(2, ONES, np.zeros(3, bool))
    assert sorted(experts.tolist()) == [0, 1, 2]
    assert len(chances) == 3
    lookahead.learn(3, np.array([0, 1]))


def test_the_chance_of_a_rank_is_how_often_it_was_right() -> None:
    lookahead = lookahead_on(gates())
    for turn in range(400):
        experts, _ = lookahead.predict(2, ONES, NONE)
        # The first rank is always right, the second every other time, the others never.
        lookahead.learn(3, experts[:2] if turn % 2 else experts[:1])
    first, second, third, fourth = lookahead.precision(3)
    assert first > 0.99
    assert second == pytest.approx(0.5, abs=0.02)
    assert third == fourth < 0.01
    assert lookahead.precision(7).tolist() == [0.5] * 4, "every layer has its own record"


def test_chances_handed_out_do_not_change_afterwards() -> None:
    lookahead = lookahead_on(gates())
    experts, chances = lookahead.predict(2, ONES, NONE)
    lookahead.learn(3, experts)
    assert chances.tolist() == [0.5] * 4
    lookahead.precision(3)[:] = 0
    assert (lookahead.precision(3) > 0.5).all()


def test_only_the_layer_predicted_last_is_learned_from_and_only_once() -> None:
    lookahead = lookahead_on(gates())
    lookahead.learn(3, np.array([0, 1]))
    experts, _ = lookahead.predict(2, ONES, NONE)
    lookahead.learn(7, experts)
    assert lookahead.precision(7).tolist() == [0.5] * 4
    lookahead.learn(3, experts)
    once = lookahead.precision(3)
    assert (once > 0.5).all()
    lookahead.learn(3, experts)
    assert lookahead.precision(3).tolist() == once.tolist()


def run_trial(gate: GainGate, steps: int, without: float, within: float) -> list[bool]:
    """Let the gate see steps that take as long as it decided; return its decisions."""
    decisions = []
    for _ in range(steps):
        decisions.append(gate.open)
        gate.step(within if gate.open else without)
    return decisions


def test_a_trial_alternates_blocks_with_and_without_prefetching() -> None:
    gate = GainGate(block=3, rounds=2, hold=5)
    assert run_trial(gate, 12, 1.0, 1.0) == ([True] * 3 + [False] * 3) * 2


@pytest.mark.parametrize(("without", "within", "winner"), [(1.0, 0.9, True), (1.0, 1.1, False), (1.0, 1.0, False)])
def test_the_quicker_way_stays_until_the_next_trial(without: float, within: float, winner: bool) -> None:
    gate = GainGate(block=2, rounds=2, hold=7)
    run_trial(gate, 8, without, within)
    assert run_trial(gate, 7, without, within) == [winner] * 7
    assert run_trial(gate, 8, without, within) == [True, True, False, False] * 2, "probing again"


def test_a_loser_comes_back_when_it_starts_to_pay() -> None:
    gate = GainGate(block=2, rounds=1, hold=3)
    run_trial(gate, 4, 1.0, 2.0)
    assert run_trial(gate, 3, 1.0, 2.0) == [False] * 3
    run_trial(gate, 4, 1.0, 0.5)
    assert run_trial(gate, 3, 1.0, 0.5) == [True] * 3


def test_a_few_slow_steps_do_not_decide_a_trial() -> None:
    gate = GainGate(block=4, rounds=2, hold=3)
    for number in range(16):
        slow = 1000.0 if gate.open and number in (0, 9) else 0.0
        gate.step(slow + (0.9 if gate.open else 1.0))
    assert gate.open
    assert run_trial(gate, 3, 1.0, 0.9) == [True] * 3


def test_a_gate_set_by_hand_does_not_move() -> None:
    on, off = GainGate("on", block=1, rounds=1), GainGate("off", block=1, rounds=1)
    for _ in range(20):
        on.step(5.0)
        off.step(0.1)
        assert on.open
        assert not off.open
