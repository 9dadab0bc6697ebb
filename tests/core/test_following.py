"""Beside an engine, a predictor hears of every sequence what it computes, and one that fails harms nobody."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.routing.ahead import AheadLoader
from expertier.routing.following import Follower
from expertier.routing.gate import Confidence, GainGate
from expertier.routing.lookahead import Lookahead
from expertier.routing.path_loads import PathLoads
from expertier.routing.predictor import Forecast, RoutedModel
from expertier.routing.sequences import Span
from support.fake_engine import FakeEngine, fake_engine, uniform, until
from support.predictors import BrokenPredictor, FixedPredictor

LAYERS, EXPERTS = (2, 3, 7), 6
MODEL = RoutedModel(layers=LAYERS, experts=(EXPERTS,) * 3, top_k=(2,) * 3, fingerprint="x")
FLAT = np.full((3, EXPERTS), 0.3, np.float32)


def span(position: int, *tokens: int, key: int = 0) -> Span:
    return Span(key=key, position=position, tokens=list(tokens))


def test_a_prompt_is_handed_over_with_the_first_token_that_is_decoded_after_it() -> None:
    predictor = FixedPredictor(MODEL, FLAT)
    follower = Follower(predictor)
    assert follower.begin([span(0, 1, 2, 3)], decode=False) is None
    assert follower.begin([span(3, 4, 5)], decode=False) is None
    assert predictor.sequences == {}
    assert follower.begin([span(5, 6)], decode=True) is not None
    assert follower.begin([span(6, 7)], decode=True) is not None
    assert predictor.sequences == {0: [1, 2, 3, 4, 5, 6, 7]}


def test_a_rejected_draft_is_taken_back() -> None:
    predictor = FixedPredictor(MODEL, FLAT)
    follower = Follower(predictor)
    follower.begin([span(0, 1)], decode=True)
    follower.begin([span(1, 2, 3, 4)], decode=False)  # the draft is checked like a prompt
    follower.begin([span(2, 9)], decode=True)
    assert predictor.sequences == {0: [1, 2, 9]}


def test_a_long_prompt_is_handed_over_by_its_end_and_going_back_before_it_begins_anew() -> None:
    class Predictor(FixedPredictor):
        def forecast(self, sequence, tokens, *, start=None):  # type: ignore[no-untyped-def]
            known = self.sequences.setdefault(sequence, [])
            if start is not None and start > len(known):
                known[:] = [-1] * start  # begins anew there
            return super().forecast(sequence, tokens, start=start)

    predictor = Predictor(MODEL, FLAT)
    follower = Follower(predictor)
    follower.begin([span(0, *range(2000))], decode=False)
    follower.begin([span(2000, 5)], decode=True)
    assert predictor.sequences[0][-512:] == [*range(1489, 2000), 5]
    assert set(predictor.sequences[0][:-512]) == {-1}
    follower.begin([span(100, 7)], decode=True)
    assert predictor.sequences[0] == [*range(100), 7]


def test_sequences_of_a_batch_are_merged_and_each_is_told_its_own_routes() -> None:
    predictor = FixedPredictor(MODEL, FLAT)
    follower = Follower(predictor)
    follower.begin([Span(key=5, position=0, tokens=None)], decode=False)
    spans = [span(0, 1, key=0), Span(key=5, position=3, tokens=None), span(0, 2, key=9)]
    forecast = follower.begin(spans, decode=True)
    assert forecast is not None
    np.testing.assert_allclose(forecast.now, 1 - 0.7**2, rtol=1e-6)
    follower.observe(2, np.array([[0, 1], [2, 3], [4, 5]]))
    assert predictor.observed == [(0, 2, [[0, 1]]), (1, 2, [[4, 5]])]
    refined = follower.refine()
    assert refined is not None
    assert not refined[0].any()
    follower.observe(3, np.array([[0, 1]]))
    assert len(predictor.observed) == 2, "rows of a layer that are not the step's say nothing"


def test_a_predictor_that_has_said_all_is_not_asked_after_every_layer() -> None:
    class Settled(BrokenPredictor):
        refines = False

    follower = Follower(Settled(MODEL, at="refine"))
    assert follower.refine() is None
    forecast = follower.begin([span(0, 1, key=0), span(0, 2, key=1)], decode=True)
    assert forecast is not None
    assert follower.refine() is forecast.now
    assert not follower.failure


@pytest.mark.parametrize("at", ["forecast", "observe", "refine", "forget"])
def test_a_predictor_that_fails_is_told_of_once_and_not_asked_again(at: str, caplog: pytest.LogCaptureFixture) -> None:
    follower = Follower(BrokenPredictor(MODEL, at=at))
    with caplog.at_level(logging.WARNING, "expertier"):
        for turn in range(3):
            follower.begin([span(0 if at == "forget" else turn, turn)], decode=True)
            follower.observe(2, np.array([[0, 1]]))
            follower.refine()
    assert "FloatingPointError" in follower.failure
    assert follower.begin([span(9, 1)], decode=True) is None
    assert follower.refine() is None
    assert len(caplog.records) == 1


def test_a_forecast_of_another_shape_is_a_failure() -> None:
    follower = Follower(FixedPredictor(MODEL, np.ones((2, EXPERTS))))
    assert follower.begin([span(0, 1)], decode=True) is None
    assert "shape" in follower.failure


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 2),  # sequence
        st.one_of(st.none(), st.integers(0, 9)),  # goes back to so many tokens
        st.lists(st.integers(0, 99), min_size=1, max_size=4),
        st.booleans(),  # decoded
    ),
    max_size=25,
)


@given(OPERATIONS)
def test_what_the_predictor_knows_when_it_is_asked_is_the_whole_sequence(
    operations: list[tuple[int, int | None, list[int], bool]],
) -> None:
    predictor = FixedPredictor(MODEL, FLAT)
    follower = Follower(predictor)
    truth: dict[int, list[int]] = {}
    numbers: dict[int, int] = {}
    for key, back, tokens, decode in operations:
        old = truth.get(key, [])
        keep = len(old) if back is None else min(back, len(old))
        given_tokens = tokens[:1] if decode else tokens
        truth[key] = old[:keep] + given_tokens
        follower.begin([span(keep, *given_tokens, key=key)], decode=decode)
        numbers.setdefault(key, len(numbers))
        if decode:
            assert predictor.sequences[numbers[key]] == truth[key]
    assert not follower.failure


# ---- loads


def never() -> None:
    raise AssertionError("nothing can begin, so nobody has to predict")


def engine_with(tmp_path: Path, slots: int) -> FakeEngine:
    shapes = uniform(3, EXPERTS)
    return fake_engine(tmp_path, shapes, slots * shapes[0].slot_bytes)  # type: ignore[return-value]


def test_all_later_layers_are_loaded_nearest_first_within_the_bound(tmp_path: Path) -> None:
    chances = np.zeros((3, EXPERTS), np.float32)
    chances[0, 1] = 0.9
    chances[1, [4, 2]] = [0.8, 0.6]
    chances[2, [0, 5]] = [0.7, 0.2]
    with engine_with(tmp_path, 12) as engine:  # type: ignore[attr-defined]
        engine.file.hold()
        loads = PathLoads(engine.manager, (0, 1, 2), confidence=Confidence(3, EXPERTS), ahead=3)
        assert loads.top_up(lambda: chances, 0) == 3
        absent, under_way = engine.manager.outlook()
        assert under_way == 3
        assert [np.flatnonzero(~row).tolist() for row in absent] == [[1], [2, 4], []]
        assert loads.top_up(never, 1) == 0, "enough is under way"
        engine.file.let_all()
        until(lambda: engine.manager.outlook()[1] == 0)
        assert loads.top_up(lambda: chances, 1) == 1, "what is unlikely stays where it is"
        until(lambda: engine.manager.outlook()[1] == 0)
        engine.check()


def test_what_is_doubtful_is_loaded_only_where_the_device_was_idle_for_some_layers(tmp_path: Path) -> None:
    chances = np.zeros((3, EXPERTS), np.float32)
    chances[1, [4, 2]] = [0.45, 0.35]
    chances[2, [0, 5]] = [0.4, 0.2]
    with engine_with(tmp_path, 12) as engine:  # type: ignore[attr-defined]
        loads = PathLoads(engine.manager, (0, 1, 2), confidence=Confidence(3, EXPERTS), ahead=4)
        begun = [loads.top_up(lambda: chances, 1)]
        while not begun[-1] and len(begun) < 50:
            begun.append(loads.top_up(lambda: chances, 1))
        assert begun[:8] == [0] * 8
        assert begun[-1] == 3, "what keeps the device busy, and nothing hopeless"
        until(lambda: engine.manager.outlook()[1] == 0)
        assert not engine.manager.outlook()[0][[1, 1, 2], [4, 2, 0]].any()


def test_a_router_gives_up_the_loads_of_its_layer_and_leaves_those_further_on(tmp_path: Path) -> None:
    chances = np.zeros((3, EXPERTS), np.float32)
    chances[1, 4] = chances[2, 0] = 0.9
    with engine_with(tmp_path, 12) as engine:  # type: ignore[attr-defined]
        manager = engine.manager
        loader = AheadLoader(
            manager=manager,
            experts=dict.fromkeys(range(3), EXPERTS),
            lookahead=None,
            gate=GainGate("on"),
            predictor=FixedPredictor(
                RoutedModel(layers=(0, 1, 2), experts=(EXPERTS,) * 3, top_k=(2,) * 3, fingerprint="x"), chances
            ),
        )
        engine.layer(0, [[0, 1]])
        engine.layer(1, [[0, 1]])
        engine.file.hold()
        loader.begin([span(0, 1)], decode=True)
        manager.begin_step(1)
        assert manager.outlook()[1] == 2
        with manager.acquire(0, [[0, 1]]):
            loader.after_router(0, np.array([[0, 1]]), lambda: None, decode=True)
        assert manager.outlook()[1] == 2, "loads for layers further on survive"
        with manager.acquire(1, [[0, 1]]):
            loader.after_router(1, np.array([[0, 1]]), lambda: None, decode=True)
        assert manager.stats().prefetches_cancelled == 1
        lease = manager.acquire(2, [[0, 1]], wait=False)
        engine.file.let_all()
        lease.wait()
        lease.release()
        manager.end_step()
        stats = manager.stats()
        assert (stats.decode.late, stats.prefetches_used) == (1, 1)
        engine.check()


def test_a_closed_gate_costs_no_forecast_and_the_predictor_catches_up_when_it_opens(tmp_path: Path) -> None:
    predictor = FixedPredictor(MODEL, FLAT)
    gate = GainGate("off")
    with engine_with(tmp_path, 12) as engine:  # type: ignore[attr-defined]
        loader = AheadLoader(
            manager=engine.manager,
            experts=dict.fromkeys(LAYERS, EXPERTS),
            lookahead=None,
            gate=gate,
            predictor=predictor,
        )
        for position in range(3):
            loader.begin([span(position, position)], decode=True)
        assert predictor.sequences == {}
        gate.mode = "on"
        loader.begin([span(3, 3)], decode=True)
        assert predictor.sequences == {0: [0, 1, 2, 3]}


def test_a_predictor_that_nobody_heeds_is_asked_only_now_and_then(tmp_path: Path) -> None:
    predictor = FixedPredictor(MODEL, FLAT)
    told: list[int] = []

    def listener(forecast: Forecast) -> bool:
        told.append(len(predictor.sequences[0]) - 1)
        return len(told) > 2

    with engine_with(tmp_path, 12) as engine:  # type: ignore[attr-defined]
        loader = AheadLoader(
            manager=engine.manager,
            experts=dict.fromkeys(LAYERS, EXPERTS),
            lookahead=None,
            gate=GainGate("off"),
            predictor=predictor,
            listener=listener,
        )
        for position in range(36):
            loader.begin([span(position, position)], decode=True)
    assert told == [0, 16, 32, 33, 34, 35], "heeded from the third time on"
    assert predictor.sequences == {0: list(range(36))}


def test_forecasts_that_take_too_much_of_a_step_are_asked_for_only_now_and_then(tmp_path: Path) -> None:
    now = 0.0

    class Slow(FixedPredictor):
        def forecast(self, sequence: int, tokens: Any, *, start: int | None = None) -> Forecast:
            nonlocal now
            now += 0.5
            return super().forecast(sequence, tokens, start=start)

    told: list[int] = []
    with engine_with(tmp_path, 12) as engine:  # type: ignore[attr-defined]
        loader = AheadLoader(
            manager=engine.manager,
            experts=dict.fromkeys(LAYERS, EXPERTS),
            lookahead=None,
            gate=GainGate("off"),
            predictor=Slow(MODEL, FLAT),
            listener=lambda forecast: told.append(position) is None,
            clock=lambda: now,
        )
        for position in range(60):
            loader.begin([span(position, position)], decode=True)
            for layer in LAYERS:
                loader.after_router(layer, np.array([[0, 1]]), lambda: None, decode=True)
            now += 1.0
    assert told[:2] == [0, 1]
    assert len(told) < 8
    assert max(np.diff(told)) == 16


def test_the_outlook_of_layers_with_unlike_numbers_of_experts_is_padded(tmp_path: Path) -> None:
    shapes = {0: uniform(1, 2)[0], 1: uniform(1, 4)[0]}
    with fake_engine(tmp_path, shapes, 4 * shapes[0].slot_bytes) as engine:
        engine.layer(1, [[1, 2]])
        absent, under_way = engine.manager.outlook()
        assert absent.tolist() == [[True, True, False, False], [True, False, False, True]]
        assert under_way == 0


def looking_ahead(engine: FakeEngine, predictor: FixedPredictor, gates: dict[int, Any]) -> AheadLoader:
    """Load ahead in three layers by a predictor and by the next layers' gates."""
    return AheadLoader(
        manager=engine.manager,
        experts=dict.fromkeys(range(3), EXPERTS),
        lookahead=Lookahead(gates=gates, norms={}, top_k=dict.fromkeys(range(3), 2)),
        gate=GainGate("on"),
        predictor=predictor,
    )


def test_the_next_gate_is_asked_only_about_layers_the_forecast_is_unsure_of(tmp_path: Path) -> None:
    chances = np.zeros((3, EXPERTS), np.float32)
    chances[1, :2] = 0.95
    chances[2, :5] = 0.4
    model = RoutedModel(layers=(0, 1, 2), experts=(EXPERTS,) * 3, top_k=(2,) * 3, fingerprint="x")
    gates = {layer: np.eye(EXPERTS, dtype=np.float32) for layer in range(3)}
    asked: list[int] = []
    with engine_with(tmp_path, 12) as engine:  # type: ignore[attr-defined]
        loader = looking_ahead(engine, FixedPredictor(model, chances), gates)
        loader.begin([span(0, 1)], decode=True)
        until(lambda: engine.manager.outlook()[1] == 0)
        for layer in range(2):

            def router_input(layer: int = layer) -> np.ndarray[Any, Any]:
                asked.append(layer)
                return np.zeros((1, EXPERTS), np.float32)

            loader.after_router(layer, np.array([[4, 5]]), router_input, decode=True)
    assert asked == [1]


def test_a_predictor_that_listens_is_told_what_the_next_routers_say(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Listener(FixedPredictor):
        listens = True

        def refine(self, sequence: int, scores: Any = None) -> Any:
            heard.append((sequence, {layer: row.tolist() for layer, row in scores.items()}))
            return super().refine(sequence)

    model = RoutedModel(layers=(0, 1, 2), experts=(EXPERTS,) * 3, top_k=(2,) * 3, fingerprint="x")
    gates = {layer: (layer + 1) * np.eye(EXPERTS, dtype=np.float32) for layer in range(3)}
    hidden = np.arange(2 * EXPERTS, dtype=np.float32).reshape(2, EXPERTS)

    def predict(chances: np.ndarray[Any, Any]) -> None:
        with engine_with(tmp_path, 12) as engine:  # type: ignore[attr-defined]
            loader = looking_ahead(engine, Listener(model, chances), gates)
            loader.begin([span(0, 1, key=0), span(0, 2, key=1)], decode=True)
            loader.after_router(0, np.array([[0, 1], [2, 3]]), lambda: hidden, decode=True)

    sure = np.zeros((3, EXPERTS))
    sure[:, :2] = 1.0
    predict(sure)
    assert not heard, "nor about a layer that the forecast is sure of"
    predict(np.zeros((3, EXPERTS)))
    first, second = hidden
    assert heard == [
        (0, {1: (2 * first).tolist(), 2: (3 * first).tolist()}),
        (1, {1: (2 * second).tolist(), 2: (3 * second).tolist()}),
    ]
