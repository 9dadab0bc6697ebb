"""The lookahead predictor on gates small enough to know the answer, and the gate that turns it off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expertier.routing import AheadLoader, GainGate, Lookahead

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


def test_several_tokens_name_each_candidate_once_and_the_chance_that_any_uses_it() -> None:
    weights = gates()
    hidden = np.stack([ONES, -ONES, ONES])
    lookahead = lookahead_on(weights)
    experts, chances = lookahead.predict(2, hidden, NONE)
    first, second = best(weights[3], ONES), best(weights[3], -ONES)
    assert sorted(experts.tolist()) == sorted({*first, *second})
    twice, once = 1 - 0.5**2, 0.5
    expected = [1 - (1 - (twice if e in first else 0)) * (1 - (once if e in second else 0)) for e in experts.tolist()]
    assert chances == pytest.approx(expected)
    assert (np.diff(chances) <= 0).all()


def test_a_batch_teaches_as_much_as_its_tokens_one_by_one_in_the_mean() -> None:
    weights = gates()
    together, apart = lookahead_on(weights), lookahead_on(weights)
    ranking = best(weights[3], ONES)
    routes = np.array([[ranking[0], ranking[1]]] * 4)
    for _ in range(100):
        together.predict(2, np.stack([ONES] * 4), NONE)
        together.learn(3, routes)
        for row in routes:
            apart.predict(2, ONES, NONE)
            apart.learn(3, row)
    assert together.precision(3) == pytest.approx(apart.precision(3), abs=1e-6)
    assert together.precision(3) == pytest.approx([1, 1, 0, 0], abs=1e-3)


def test_a_prediction_for_more_tokens_than_the_router_saw_teaches_nothing() -> None:
    lookahead = lookahead_on(gates())
    lookahead.predict(2, np.stack([ONES] * 3), NONE)
    lookahead.learn(3, np.array([[0, 1]]))
    assert lookahead.precision(3).tolist() == [0.5] * 4


class Recorder:
    """Takes the place of the manager."""

    bytes_read = 0

    def __init__(self, absent: set[int]) -> None:
        self.absent = absent
        self.calls: list[tuple[int, list[int], int]] = []

    def resident(self, layer: int) -> NDArray[np.bool_]:
        return np.array([expert not in self.absent for expert in range(EXPERTS)])

    def prefetch(self, layer: int, experts: Any, probabilities: Any = None, *, limit: int) -> int:
        self.calls.append((layer, list(experts), limit))
        return len(experts)


def ahead(recorder: Recorder, *, lookahead: bool = True, last_is_narrow: bool = False) -> AheadLoader:
    weights = gates()
    return AheadLoader(
        manager=recorder,
        experts=dict.fromkeys(weights, EXPERTS),
        lookahead=lookahead_on(weights) if lookahead else None,
        gate=GainGate("on"),
        last_is_narrow=last_is_narrow,
    )


def test_a_prompt_that_needs_most_of_a_layer_streams_the_next_one_whole() -> None:
    recorder = Recorder(set(range(EXPERTS)))
    loader = ahead(recorder)
    loader.after_router(2, np.array([[0, 1], [2, 3]]), no_gate_input, decode=False)
    loader.after_router(3, np.array([[0, 1], [1, 0]]), no_gate_input, decode=False)
    assert recorder.calls == [(3, list(range(EXPERTS)), EXPERTS)]


def test_a_last_layer_that_gets_few_rows_is_not_streamed_until_it_gets_all() -> None:
    recorder = Recorder(set(range(EXPERTS)))
    loader = ahead(recorder, last_is_narrow=True)
    many = np.array([[0, 1], [2, 3], [4, 5], [0, 2]])
    for last, expected in ((many[:1], []), (many, []), (many, [7])):
        recorder.calls.clear()
        loader.after_router(2, many, no_gate_input, decode=False)
        loader.after_router(3, many, no_gate_input, decode=False)
        loader.after_router(7, last, no_gate_input, decode=False)
        assert [layer for layer, _, _ in recorder.calls if layer == 7] == expected


def test_a_decode_batch_loads_what_its_tokens_will_probably_need() -> None:
    recorder = Recorder({0, 1, 2})
    loader = ahead(recorder)
    loader.after_router(2, np.array([[0, 1], [2, 3]]), lambda: np.stack([ONES, -ONES]), decode=True)
    ((layer, experts, limit),) = recorder.calls
    assert (layer, limit) == (3, 4)
    assert experts and set(experts) <= {0, 1, 2}


@pytest.mark.parametrize("absent", [set(), {0}])
def test_the_routers_input_is_fetched_only_when_something_is_absent(absent: set[int]) -> None:
    asked = []
    loader = ahead(Recorder(absent))
    loader.after_router(2, np.array([[0, 1]]), lambda: asked.append(1), decode=True)
    assert len(asked) == len(absent)


def test_with_stand_ins_only_what_the_next_layers_tokens_insist_on_is_loaded_ahead() -> None:
    recorder = Recorder(set(range(EXPERTS)))
    loader = ahead(recorder)
    hidden = np.random.default_rng(5).normal(size=(2, gates()[2].shape[1])).astype(np.float32)
    told = []

    def insisted(layer: int, scores: Vector) -> NDArray[np.int64]:
        told.append((layer, scores))
        return np.array([4]) if layer == 3 else np.zeros(0, np.int64)

    for layer in (2, 3, 7):
        routes = np.array([[0, 1], [1, 2]])
        loader.after_router(layer, routes, lambda: hidden, decode=True, insisted=insisted)
    assert [layer for layer, _ in told] == [3, 7]
    np.testing.assert_allclose(told[0][1], hidden @ gates()[3].T, rtol=1e-6)
    assert [(layer, experts) for layer, experts, _ in recorder.calls] == [(3, [4])]


def no_gate_input() -> None:
    raise AssertionError("streaming needs no prediction")


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


@pytest.mark.parametrize(("without", "within", "winner"), [(1.0, 0.9, True), (1.0, 1.1, False), (1.0, 1.0, True)])
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


def test_who_wins_again_stays_twice_as_long_and_who_loses_starts_over() -> None:
    gate = GainGate(block=1, rounds=1, hold=2)
    for hold in (2, 4, 8, 16, 16):
        run_trial(gate, 2, 1.0, 0.5)
        assert run_trial(gate, hold, 1.0, 0.5) == [True] * hold
    run_trial(gate, 2, 1.0, 2.0)
    assert run_trial(gate, 2, 1.0, 2.0) == [False] * 2
    assert run_trial(gate, 2, 1.0, 2.0) == [True, False], "a new trial"


@pytest.mark.parametrize(("within", "winner"), [(1.0, False), (0.99, False), (0.9, True)])
def test_bytes_that_buy_no_time_close_the_gate(within: float, winner: bool) -> None:
    gate = GainGate(block=2, rounds=2, hold=5)
    for _ in range(8):
        gate.step(within if gate.open else 1.0, 120 if gate.open else 100)
    assert gate.open is winner


def test_a_trial_that_could_be_chance_goes_on_and_comes_to_an_end() -> None:
    unclear, clear = GainGate(block=1, rounds=8, hold=100), GainGate(block=1, rounds=8, hold=100)
    for number in range(16):
        varying = 1.0 + 0.5 * (number % 4 > 1)
        unclear.step(varying * (0.97 if unclear.open else 1.0))
        clear.step(varying * (0.3 if clear.open else 1.0))
    assert clear.learned() is True
    assert unclear.learned() is None
    for number in range(48):
        unclear.step((1.0 + 0.5 * (number % 4 > 1)) * (0.97 if unclear.open else 1.0))
    assert unclear.learned() is True


def test_a_gate_set_by_hand_does_not_move() -> None:
    on, off = GainGate("on", block=1, rounds=1), GainGate("off", block=1, rounds=1)
    for _ in range(20):
        on.step(5.0)
        off.step(0.1)
        assert on.open
        assert not off.open
