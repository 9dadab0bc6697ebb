"""A predictor moves bytes and nothing else: right, wrong or broken, every logit is stock's and the budget holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertier.errors import PredictorMissingError
from expertier.routing.predictor import RoutedModel, RoutePredictor
from expertier_llamacpp import Llama, llama
from llamacpp.engines import PROMPT, closing, expertier, last_logits, sizes, stock_trace, stock_twin, trace
from support.predictors import BrokenPredictor, FixedPredictor, WrongPredictor
from support.tiny_gguf import TinySpec

pytestmark = pytest.mark.engine

TinyModel = Callable[[TinySpec], Path]
PLAIN = TinySpec(experts=16)
Make = Callable[[RoutedModel], RoutePredictor]


@pytest.fixture
def plain(tiny_model: TinyModel) -> Path:
    return tiny_model(PLAIN)


@pytest.fixture(scope="module")
def plain_rows(tiny_model: TinyModel) -> list[bytes]:
    return stock_trace(tiny_model(PLAIN))


@contextmanager
def predicted(path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Iterator[Llama]:
    """Load with a predictor that is always listened to."""
    monkeypatch.setattr(llama, "open_predictor", lambda option, catalog, *rest: make(RoutedModel.of_catalog(catalog)))
    with closing(expertier(path, **{"budget": sizes(path).layer, "expert_lookahead": "on", **changes})) as llm:
        yield llm


def everything(model: RoutedModel) -> RoutePredictor:
    return FixedPredictor(model, np.ones(model.shape))


def nonsense(model: RoutedModel) -> RoutePredictor:
    return FixedPredictor(model, np.full(model.shape, np.nan))


@pytest.mark.parametrize("policy", ["lfu", "predictive"])
@pytest.mark.parametrize(
    "make", [WrongPredictor, everything, nonsense, BrokenPredictor], ids=lambda make: make.__name__
)
def test_whatever_a_predictor_says_the_logits_are_stocks_and_the_budget_holds(
    plain: Path, plain_rows: list[bytes], make: Make, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with predicted(plain, make, monkeypatch, expert_policy=policy) as llm:
        assert trace(llm) == plain_rows
        stats = llm.offload.stats()
        assert stats.peak_resident_bytes <= stats.budget_bytes
        assert stats.prefetches > 8, "what says nothing of use leaves the lookahead"
        assert stats.decode.misses > 0


def test_a_predictor_that_knows_the_routes_turns_misses_into_loads_under_way(
    plain: Path, plain_rows: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    routes: list[np.ndarray[Any, Any]] = []

    class Recorder(FixedPredictor):
        def observe(self, sequence: int, layer: int, table: np.ndarray[Any, Any]) -> None:
            if self.model.position[layer] == 0:
                routes.append(np.zeros(self.model.shape, np.float32))
            routes[-1][self.model.position[layer], table.ravel()] = 1.0
            super().observe(sequence, layer, table)

    class Replayer(FixedPredictor):
        def forecast(self, sequence: int, tokens: Any, *, start: int | None = None) -> Any:
            self.chances = routes.pop(0)
            return super().forecast(sequence, tokens, start=start)

    misses = []
    for kind in (Recorder, Replayer):
        with predicted(plain, lambda model, kind=kind: kind(model, np.zeros(model.shape)), monkeypatch) as llm:  # type: ignore[misc]
            assert trace(llm) == plain_rows
            misses.append(llm.offload.stats().decode.misses)
    first_layers = 16 * 2  # the first layer's loads begin only a moment before they are needed, so they may be either
    assert misses[1] <= first_layers < misses[0]


def test_going_back_and_beginning_anew_keep_the_predictor_in_step(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FixedPredictor] = []

    def make(model: RoutedModel) -> RoutePredictor:
        made.append(WrongPredictor(model))
        return made[0]

    def steps(llm: Any) -> list[bytes]:
        rows = []
        for keep, tokens in ((0, PROMPT), (41, [5]), (42, [6, 7, 8]), (43, [9]), (20, [1]), (0, [2, 3]), (2, [4])):
            llm.n_tokens = keep
            llm.eval(tokens)
            rows.append(last_logits(llm).tobytes())
        return rows

    with closing(stock_twin(plain)) as twin:
        expected = steps(twin)
    with predicted(plain, make, monkeypatch) as llm:
        assert steps(llm) == expected
    assert made[0].sequences == {0: [2, 3, 4]}


def test_a_predictor_that_was_never_trained_is_refused_by_name(plain: Path) -> None:
    with pytest.raises(PredictorMissingError, match="no trained predictor"):
        expertier(plain, "50%", expert_predictor=str(plain.parent / "absent"))


def test_the_mode_line_says_what_predicts(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(expertier(plain, "50%", expert_lookahead="off")) as llm:
        assert "prediction by nothing" in llm.mode_line()
    with predicted(plain, WrongPredictor, monkeypatch) as llm:
        assert "prediction by wrong + lookahead" in llm.mode_line()
