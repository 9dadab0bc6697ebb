"""Route predictors: what they learn, that sequences may go back, and that a saved one is refused for another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.config import OffloadOptions
from expertier.errors import (
    PredictorFormatError,
    PredictorMismatchError,
    PredictorMissingError,
    PredictorVersionError,
)
from expertier.routing.blend import BlendScorer, BlendWeights, fit_logistic, logit
from expertier.routing.evaluate import AHEAD, BEFORE, SOON, Score, find
from expertier.routing.history import SequencePredictor
from expertier.routing.lookahead import Lookahead
from expertier.routing.opening import policy_for
from expertier.routing.path import PathScorer, PathShape
from expertier.routing.predictor import HORIZONS, Forecast, RoutePredictor, merge
from expertier.routing.products import times
from expertier.routing.recorder import TraceRecorder
from expertier.routing.saved import MANIFEST, Trained, load, load_predictor, save
from expertier.routing.table import TableScorer, count_layers
from expertier.routing.trace import read_trace
from expertier.routing.train import TrainSettings, report, train
from expertier.routing.windows import Windows, read_windows
from support.lawful import VOCABULARY, lawful_text, lawful_windows, routed_model
from support.traces import header

torch = pytest.importorskip("torch")

SHAPE = PathShape(vocabulary=VOCABULARY, layers=3, experts=8, width=16, inner=24, route_width=8)


@pytest.fixture(scope="module")
def trained() -> tuple[Trained, Windows]:
    """All predictors, after a few seconds on lawful text."""
    return train(lawful_windows(96), tokens=True, settings=TrainSettings(seconds=1e6, epochs=24, width=32))


@pytest.fixture(scope="module")
def scores(trained: tuple[Trained, Windows]) -> list[Score]:
    return report(trained[0], [("kept back", trained[1])])


def network_of(seed: int) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    from expertier.routing.path_network import PathNetwork, to_arrays

    torch.manual_seed(seed)
    network = PathNetwork(SHAPE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network, to_arrays(network)


def follow(predictor: RoutePredictor, text: np.ndarray[Any, Any], routes: np.ndarray[Any, Any], at: int) -> Forecast:
    """One decode step with its routes."""
    forecast = predictor.forecast(7, text[at : at + 1], start=at)
    for layer in range(3):
        predictor.observe(7, layer, routes[at, layer])
    return forecast


def test_numpy_computes_what_torch_was_trained_with() -> None:
    network, weights = network_of(0)
    text, routes = lawful_text(30)
    used = np.zeros((1, 30, 3, 8), np.float32)
    np.put_along_axis(used[0], routes, 1.0, axis=2)
    with torch.inference_mode():
        logits = network(torch.from_numpy(text)[None], torch.from_numpy(used.reshape(1, 30, 24)), torch.ones(1, 1, 1))
        wanted = torch.sigmoid(logits)[0].numpy().reshape(30, 4, 3, 8)
    predictor = SequencePredictor("path", routed_model(), PathScorer(routed_model(), SHAPE, weights))
    for at in range(30):
        forecast = follow(predictor, text, routes, at)
        np.testing.assert_allclose(forecast.now, wanted[at, 0], atol=1e-5)
        np.testing.assert_allclose(forecast.soon, wanted[at, 1:], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    moves=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), min_size=1, max_size=8),
    seed=st.integers(0, 3),
)
def test_a_sequence_that_went_back_is_predicted_as_if_it_never_had_been_further(
    moves: list[tuple[int, int]], seed: int
) -> None:
    _, weights = network_of(1)
    model = routed_model()
    texts = [lawful_text(100, seed=10 * seed + number) for number in range(len(moves) + 1)]
    wandering = SequencePredictor("path", model, PathScorer(model, SHAPE, weights))
    held: list[tuple[int, Any]] = []  # token and routes that the engine's sequence consists of
    forecast = None
    for number, (back, count) in enumerate(moves):
        start = min(back, len(held))
        text, routes = texts[number]
        del held[start:]
        forecast = wandering.forecast(0, text[start : start + count], start=start)
        for layer in range(3):
            wandering.observe(0, layer, routes[start : start + count, layer])
        held += [(int(text[at]), routes[at]) for at in range(start, start + count)]
    straight = SequencePredictor("path", model, PathScorer(model, SHAPE, weights))
    last = len(held) - moves[-1][1]
    if last:
        straight.forecast(0, np.array([token for token, _ in held[:last]]), start=0)
        for layer in range(3):
            straight.observe(0, layer, np.stack([routes[layer] for _, routes in held[:last]]))
    wanted = straight.forecast(0, np.array([token for token, _ in held[last:]]), start=last)
    assert forecast is not None
    np.testing.assert_allclose(forecast.now, wanted.now, atol=1e-5)
    np.testing.assert_allclose(forecast.soon, wanted.soon, atol=1e-5)


def test_hundreds_of_decoded_tokens_can_be_taken_back() -> None:
    _, weights = network_of(2)
    text, routes = lawful_text(700)
    predictor = SequencePredictor("path", routed_model(), PathScorer(routed_model(), SHAPE, weights))
    forecasts = [follow(predictor, text, routes, at) for at in range(700)]
    for at in (690, 500, 301, 40, 0):
        np.testing.assert_allclose(follow(predictor, text, routes, at).now, forecasts[at].now, atol=1e-5)


def test_sequences_do_not_disturb_one_another() -> None:
    _, weights = network_of(3)
    text, routes = lawful_text(20)
    alone = SequencePredictor("path", routed_model(), PathScorer(routed_model(), SHAPE, weights))
    both = SequencePredictor("path", routed_model(), PathScorer(routed_model(), SHAPE, weights))
    for at in range(20):
        other = both.forecast(8, text[::-1][at : at + 1])
        assert other.now.shape == (3, 8)
        wanted, found = follow(alone, text, routes, at), follow(both, text, routes, at)
        np.testing.assert_allclose(found.now, wanted.now, atol=1e-6)
    both.forget(8)
    both.forget(99)


def test_a_start_beyond_the_known_end_begins_anew() -> None:
    _, weights = network_of(4)
    text, _ = lawful_text(20)
    predictor = SequencePredictor("path", routed_model(), PathScorer(routed_model(), SHAPE, weights))
    fresh = predictor.forecast(0, text[:5])
    predictor.forecast(1, text[10:15])
    np.testing.assert_allclose(predictor.forecast(1, text[:5], start=400).now, fresh.now, atol=1e-6)
    following = predictor.forecast(0, text[5:6])
    np.testing.assert_allclose(predictor.forecast(1, text[5:6], start=405).now, following.now, atol=1e-6)


def test_the_path_network_learns_what_only_who_reads_in_order_knows(scores: list[Score]) -> None:
    path = find(scores, "path", BEFORE, "kept back")
    tokens = find(scores, "tokens", BEFORE, "kept back")
    frequency = find(scores, "static frequency", BEFORE, "kept back")
    assert path and tokens and frequency
    assert tokens.mean_recall() > 0.6 > frequency.mean_recall()
    assert path.mean_recall() > 0.97
    assert path.mean_precision(2.0) == pytest.approx(0.5 * path.mean_recall(2.0))


def test_half_of_the_next_tokens_experts_follow_from_this_token(scores: list[Score]) -> None:
    path = find(scores, "path", SOON[0], "kept back")
    previous = find(scores, "previous token", SOON[0], "kept back")
    assert path and previous
    assert path.mean_recall() > 0.55 > previous.mean_recall()


def test_the_table_knows_the_next_layers_from_those_before_and_nothing_before_the_first(scores: list[Score]) -> None:
    ahead = find(scores, "table", AHEAD[0], "kept back")
    before = find(scores, "table", BEFORE, "kept back")
    assert ahead and before
    assert np.isnan(ahead.recall[0][0]), "no layer comes before the first"
    assert min(ahead.recall[0][1:]) > 0.9
    assert before.mean_recall() < 0.5


def test_the_blend_is_as_good_as_its_best_part_and_its_chances_are_true(scores: list[Score]) -> None:
    for horizon in (BEFORE, *SOON):
        blend, path = find(scores, "blend", horizon, "kept back"), find(scores, "path", horizon, "kept back")
        assert blend and path
        assert blend.mean_recall() > path.mean_recall() - 0.02
        assert blend.calibration_error < 0.1
    refined = find(scores, "blend", AHEAD[0], "kept back")
    assert refined and min(refined.recall[0][1:]) > 0.97


def test_two_trainings_with_one_seed_are_one() -> None:
    windows = lawful_windows(16)
    settings = TrainSettings(seconds=1e6, epochs=1, width=16)
    first, second = (train(windows, tokens=True, settings=settings)[0] for _ in range(2))
    assert first.path and second.path
    for name, array in first.path[1].items():
        np.testing.assert_array_equal(array, second.path[1][name])


def test_without_token_ids_there_is_a_table_and_its_blend() -> None:
    windows = lawful_windows(30)
    found, _ = train(replace(windows, tokens=np.zeros_like(windows.tokens)), tokens=False)
    assert found.names == ("blend", "table")
    with pytest.raises(PredictorMissingError, match=r"'path' was not trained.*token ids"):
        found.predictor("path")
    with pytest.raises(PredictorMissingError, match=r"no predictor 'oracle'.*blend, path, tokens, table"):
        found.predictor("oracle")


def test_a_model_that_uses_one_expert_has_a_table_of_whole_keys() -> None:
    dice = np.random.default_rng(0)
    first, second = dice.integers(0, 4, (2, 30, 32))
    routes = np.stack([first, second, (first * second) % 4], 2)[..., None].astype(np.int16)  # not linear in them
    windows = Windows(
        model=routed_model(experts=4, top_k=1),
        tokens=np.zeros((30, 32), np.int64),
        request=np.arange(30),
        routes=routes,
    )
    table = count_layers(windows)
    predictor = SequencePredictor("table", windows.model, TableScorer(windows.model, table))
    for one in range(4):
        for other in range(4):
            predictor.forecast(0, np.array([0]))
            predictor.observe(0, 0, np.array([one]))
            predictor.observe(0, 1, np.array([other]))
            assert predictor.refine(0)[2].argmax() == one * other % 4


def test_layers_that_were_observed_have_no_chance_any_more(trained: tuple[Trained, Windows]) -> None:
    text, routes = lawful_text(3)
    for name in trained[0].names:
        predictor = trained[0].predictor(name)
        forecast = predictor.forecast(0, text[:1])
        whole = forecast.now.copy()
        predictor.observe(0, 0, routes[0, 0])
        refined = predictor.refine(0)
        assert not refined[0].any()
        assert refined[1:].any(axis=1).all()
        np.testing.assert_array_equal(forecast.now, whole)


def test_merged_chances_are_those_of_at_least_one() -> None:
    first = Forecast(now=np.full((2, 3), 0.5, np.float32), soon=np.full((3, 2, 3), 0.2, np.float32))
    second = Forecast(now=np.full((2, 3), 0.4, np.float32), soon=np.zeros((3, 2, 3), np.float32))
    both = merge([first, second])
    np.testing.assert_allclose(both.now, 0.7, atol=1e-6)
    np.testing.assert_allclose(both.soon, 0.2, atol=1e-6)
    assert merge([first]) is first


def test_a_blend_listens_to_the_lookahead_where_it_is_given() -> None:
    model = routed_model()
    now = np.zeros((2, 5, 3, 6), np.float32)
    now[1, :, :, 4] = 1.0
    weights = BlendWeights(now=now, soon=np.zeros((len(HORIZONS), 3, 3), np.float32))
    predictor = SequencePredictor("blend", model, BlendScorer(model, {}, np.full((3, 8), 0.25, np.float32), weights))
    predictor.forecast(0, np.array([1]))
    predictor.observe(0, 0, np.array([0, 1]))
    scores = np.arange(8, dtype=np.float32)
    refined = predictor.refine(0, {2: scores})
    assert (np.diff(refined[2]) > 0).all()
    assert np.ptp(refined[1]) == 0


@pytest.mark.parametrize(("weight", "refines"), [(0.05, False), (0.5, True)])
def test_a_blend_whose_table_repeats_the_path_says_all_before_the_first_layer(
    trained: tuple[Trained, Windows], weight: float, refines: bool
) -> None:
    now = np.zeros((2, 5, 3, 6), np.float32)
    now[..., 0] = 1.0
    now[:, 1:, :, 2] = weight
    blend = BlendWeights(now=now, soon=np.ones((len(HORIZONS), 3, 3), np.float32))
    predictor = replace(trained[0], blend=blend).predictor()
    text, routes = lawful_text(3)
    forecast = predictor.forecast(0, text[:1])
    predictor.observe(0, 0, routes[0, 0])
    assert predictor.refines is refines
    assert np.array_equal(predictor.refine(0)[1:], forecast.now[1:]) is not refines


@pytest.mark.parametrize("shape", [(), (1,), (5,), (70,)])
def test_products_are_those_of_a_matrix_and_each_vector(shape: tuple[int, ...]) -> None:
    dice = np.random.default_rng(0)
    matrix, vectors = dice.standard_normal((7, 40)), dice.standard_normal((*shape, 40))
    np.testing.assert_allclose(times(matrix, vectors), vectors @ matrix.T)


def test_logistic_regression_finds_the_weights_that_made_the_data() -> None:
    dice = np.random.default_rng(0)
    inputs = np.concatenate([dice.standard_normal((20_000, 2)), np.ones((20_000, 1))], 1)
    used = dice.random(20_000) < 1 / (1 + np.exp(-(inputs @ [1.5, -0.5, -1.0])))
    assert fit_logistic(inputs, used) == pytest.approx([1.5, -0.5, -1.0], abs=0.1)
    assert logit(np.array([0.0, 0.5, 1.0], np.float32))[1] == 0


def test_the_lookahead_scores_later_layers_under_their_own_norms() -> None:
    dice = np.random.default_rng(0)
    gates = {layer: dice.standard_normal((8, 6)).astype(np.float32) for layer in range(3)}
    norms = {layer: dice.uniform(0.5, 2, 6).astype(np.float32) for layer in range(3)}
    lookahead = Lookahead(gates=gates, norms=norms, top_k=dict.fromkeys(gates, 2))
    residual = dice.standard_normal(6).astype(np.float32)
    scores = lookahead.scores(0, residual * norms[0])
    assert list(scores) == [1, 2]
    for layer in (1, 2):
        np.testing.assert_allclose(scores[layer], gates[layer] @ (residual * norms[layer]), rtol=1e-4)
    assert list(lookahead.scores(0, residual, ahead=1)) == [1]
    assert lookahead.scores(2, residual) == {}


def test_the_blend_learns_from_samples_how_far_to_trust_the_lookahead(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    gates = {layer: dice.standard_normal((8, 6)).astype(np.float32) for layer in range(3)}
    lookahead = Lookahead(gates=gates, norms={}, top_k=dict.fromkeys(gates, 2))
    shape = header(3, 8, 2, tokens=True, hidden_size=6)
    with TraceRecorder(tmp_path / "sampled.trace", shape) as recorder:
        for request in range(36):
            for position in range(40):
                hidden = dice.standard_normal((1, 6)).astype(np.float32)  # the same for all layers: it knows the routes
                recorder.begin_step("decode", requests=request, positions=[position], token_ids=[position % 5])
                for layer in range(3):
                    chosen = np.argsort(-(hidden @ gates[layer].T), axis=1)[:, :2]
                    recorder.record(layer, chosen, hidden=hidden)
                recorder.end_step()
    windows, _ = read_windows([read_trace(tmp_path / "sampled.trace")])
    assert windows.inputs is not None and len(windows.inputs.window) == 36 * 40 * 3
    trained, kept_back = train(windows, tokens=False, lookahead=lookahead)
    scores = report(trained, [("kept back", kept_back)], lookahead=lookahead)
    alone = find(scores, "lookahead", AHEAD[0], "kept back")
    mixed, without = (find(scores, name, AHEAD[0], "kept back") for name in ("blend + lookahead", "blend"))
    assert alone and mixed and without
    assert alone.mean_recall() > 0.99 and mixed.mean_recall() > without.mean_recall() + 0.1
    assert find(scores, "lookahead", BEFORE, "kept back") is None


# ---- saved predictors


@pytest.fixture
def folder(tmp_path: Path, trained: tuple[Trained, Windows]) -> Path:
    save(tmp_path / "predictor", trained[0])
    return tmp_path / "predictor"


def test_a_saved_predictor_says_the_same(folder: Path, trained: tuple[Trained, Windows]) -> None:
    text, _ = lawful_text(5)
    for name in trained[0].names:
        wanted = trained[0].predictor(name).forecast(0, text)
        found = load_predictor(folder, routed_model(), name).forecast(0, text)
        np.testing.assert_allclose(found.now, wanted.now, atol=2e-3)  # the embedding is saved in half precision
        np.testing.assert_allclose(found.soon, wanted.soon, atol=2e-3)


def test_conversions_of_a_model_share_a_predictor_and_other_models_do_not(
    tmp_path: Path, trained: tuple[Trained, Windows]
) -> None:
    model = routed_model(routers="a" * 32, name="narrow.gguf")
    save(tmp_path, replace(trained[0], model=model))
    load(tmp_path, routed_model(routers="a" * 32, fingerprint="other", name="wide.gguf"))
    for other, words in (
        (routed_model(routers="b" * 32, name="x.gguf"), "whose routers are not those of x.gguf"),
        (routed_model(top_k=3, routers="a" * 32), "with 2 experts per token; this model has 3"),
        (routed_model(experts=16, routers="a" * 32), "with 8 experts per layer; this model has 16"),
        (routed_model(layers=4, routers="a" * 32), "layers"),
    ):
        with pytest.raises(PredictorMismatchError, match=words):
            load(tmp_path, other)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), PredictorMissingError, "holds no trained predictor"),
        (lambda folder: (folder / MANIFEST).write_text("[1"), PredictorFormatError, "does not describe a predictor"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), PredictorFormatError, "does not describe a predictor"),
        (lambda folder: (folder / "path.safetensors").unlink(), PredictorFormatError, "path.safetensors"),
        (
            lambda folder: (folder / "path.safetensors").write_bytes((folder / "path.safetensors").read_bytes()[:-9]),
            PredictorFormatError,
            "cannot be read",
        ),
        (
            lambda folder: (folder / "path.safetensors").write_bytes((folder / "table.safetensors").read_bytes()),
            PredictorFormatError,
            "not the file that was saved",
        ),
    ],
)
def test_damaged_predictors_are_refused(folder: Path, damage: Any, error: type[Exception], words: str) -> None:
    damage(folder)
    with pytest.raises(error, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": 2}, PredictorVersionError, "version 2"),
        ({"version": "1"}, PredictorFormatError, "does not describe"),
        ({"model": {"layers": [0]}}, PredictorFormatError, "no possible model"),
        (
            {"path": {"vocabulary": 12, "layers": 3, "experts": 8, "width": 999}},
            PredictorFormatError,
            "should have shape",
        ),
        (
            {"path": {"vocabulary": 12, "layers": 3, "experts": 8, "nonsense": 1}},
            PredictorFormatError,
            "cannot be read",
        ),
        ({"files": {}}, PredictorFormatError, "cannot be read"),
    ],
)
def test_a_manifest_that_contradicts_its_files_is_refused(
    folder: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(error, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("asked", "predicted", "lossy", "policy"),
    [
        ("auto", True, False, "predictive"),
        ("auto", False, False, "lfu"),
        ("auto", True, True, "lfu"),
        ("lru", True, False, "lru"),
        ("predictive", False, True, "predictive"),
    ],
)
def test_what_stays_follows_a_predictor_where_there_is_one_unless_the_user_says_otherwise(
    trained: tuple[Trained, Windows], asked: str, predicted: bool, lossy: bool, policy: str
) -> None:
    predictor = trained[0].predictor() if predicted else None
    assert policy_for(OffloadOptions.from_mapping({"policy": asked}), predictor, lossy=lossy) == policy
