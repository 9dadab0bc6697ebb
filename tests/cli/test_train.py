"""``expertier train`` as a user meets it, and how what it wrote is found again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from expertier.catalog import read_catalog
from expertier.catalog.routers import read_embedding, read_routers, routers_digest
from expertier.errors import PredictorMissingError
from expertier.routing.opening import open_predictor, predictor_folder
from expertier.routing.predictor import RoutedModel
from expertier.routing.saved import load, save
from expertier.routing.trace import read_trace
from expertier.routing.train import train
from expertier.routing.windows import read_windows
from support.lawful import lawful_trace, lawful_windows
from support.tiny_gguf import TinySpec

Invoke = Callable[..., Result]

pytest.importorskip("torch")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return lawful_trace(tmp_path / "routes.trace").path


def test_training_writes_predictors_a_report_and_a_picture(invoke: Invoke, tmp_path: Path, trace: Path) -> None:
    other = lawful_trace(tmp_path / "other.trace", seed=5).path
    out = tmp_path / "out"
    result = invoke("train", trace, "--test", other, "--out", out, "--epochs", "1", "--width", "16")
    assert result.exit_code == 0, result.output
    assert "blend, path, tokens, table" in result.stdout
    assert "kept back: " in result.stdout and "other: " in result.stdout
    assert load(out).names == ("blend", "path", "tokens", "table")
    text = (out / "report.json").read_text()
    assert "NaN" not in text, "JSON has no such number"
    record = json.loads(text)
    named = {(item["predictor"], item["text"]) for item in record["scores"]}
    predictors = ("blend", "path", "tokens", "table", "previous token", "static frequency")
    assert named == {(name, text) for name in predictors for text in ("kept back", "other")}
    assert (out / "report.png").stat().st_size > 10_000
    assert sorted(path.name for path in out.iterdir() if path.suffix in (".part", ".tmp")) == []


def test_domains_are_held_out_whole_and_reported_on(invoke: Invoke, tmp_path: Path) -> None:
    path = lawful_trace(tmp_path / "routes.trace", domains=("prose", "code")).path
    out = tmp_path / "out"
    result = invoke("train", path, "--hold-out", "code", "--out", out, "--epochs", "1", "--width", "16")
    assert result.exit_code == 0, result.output
    everything, _ = read_windows([read_trace(path)])
    assert everything.domain is not None
    scores = json.loads((out / "report.json").read_text())["scores"]
    told = {item["text"]: item["tokens"] for item in scores if item["horizon"] == "before layer 0"}
    assert told["domains held out"] == everything.apart(["code"])[1].count
    assert load(out).facts["tokens"] < everything.apart(["code"])[0].count
    for wrong, words in ((["poetry"], "Choose from: code, prose"), (["code", "prose"], "No text is left")):
        flags = [flag for name in wrong for flag in ("--hold-out", name)]
        result = invoke("train", path, *flags, "--out", tmp_path / "no")
        assert result.exit_code == 2 and words in result.stderr, result.output


def test_the_same_as_json(invoke_json: Callable[..., Any], tmp_path: Path, trace: Path) -> None:
    result = invoke_json("train", trace, "--out", tmp_path / "out", "--report", "--epochs", "1", "--width", "16")
    assert result["predictors"] == ["blend", "path", "tokens", "table"]
    assert {score["text"] for score in result["scores"]} == {"kept back"}
    assert result["facts"]["tokens"] > 100


def test_a_trace_without_token_ids_gives_what_routes_alone_give(invoke: Invoke, tmp_path: Path) -> None:
    trace = lawful_trace(tmp_path / "routes.trace", ids=False).path
    result = invoke("train", trace, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no token ids" in result.stderr
    assert load(tmp_path / "out").names == ("blend", "table")
    assert not (tmp_path / "out" / "report.json").exists()


def test_traces_that_cannot_be_learnt_from_are_refused(invoke: Invoke, tmp_path: Path, trace: Path) -> None:
    single = lawful_trace(tmp_path / "single.trace", requests=1, tokens=1).path
    empty = lawful_trace(tmp_path / "empty.trace", requests=0).path
    few = lawful_trace(tmp_path / "few.trace", requests=2).path
    data = trace.read_bytes()
    (tmp_path / "cut.trace").write_bytes(data[:-40])
    (tmp_path / "newer.trace").write_bytes(data[:8] + b"\x09\0\0\0" + data[12:])
    (tmp_path / "text.trace").write_text("some words")
    for path, words in (
        (single, "a single token"),
        (empty, "no token"),
        (few, "2 sequences; at least 4"),
        (tmp_path / "cut.trace", "without an end mark"),
        (tmp_path / "newer.trace", "Use a newer Expertier"),
        (tmp_path / "text.trace", "not a trace of routes"),
        (tmp_path / "absent.trace", "Cannot read"),
    ):
        result = invoke("train", path, "--out", tmp_path / "out")
        assert result.exit_code == 2 and words in result.stderr, (path, result.output)
        assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "predictor.json").exists()


def test_traces_of_two_models_are_not_mixed(invoke: Invoke, tmp_path: Path) -> None:
    first = lawful_trace(tmp_path / "first.trace", routers="a" * 32).path
    second = lawful_trace(tmp_path / "second.trace", routers="b" * 32).path
    again = lawful_trace(tmp_path / "again.trace", routers="a" * 32, seed=3).path
    for arguments, words in (
        ((first, second), "Train on traces of one model"),
        ((first, "--test", second), "Test on traces of the model that is trained for"),
    ):
        result = invoke("train", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2 and words in result.stderr, result.output
    joined, _ = read_windows([read_trace(first), read_trace(again)])
    assert joined.count == 2 * 12 * 24


def test_the_model_must_be_that_of_the_traces(
    invoke: Invoke, tmp_path: Path, trace: Path, tiny_model: Callable[[TinySpec], Path]
) -> None:
    result = invoke("train", trace, "--model", tiny_model(TinySpec()), "--out", tmp_path / "out")
    assert result.exit_code == 2 and "Name the model they were recorded with" in result.stderr


def test_without_torch_training_says_what_to_install(
    invoke: Invoke, tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("train_path", "path_network", "path_start"):
        monkeypatch.delitem(sys.modules, f"expertier.routing.{name}", raising=False)
    result = invoke("train", trace, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "expertier[train]" in result.stderr


# ---- how a run finds its predictor


def test_a_run_finds_the_predictor_of_its_model_by_place_or_by_name(
    tmp_path: Path, tiny_model: Callable[[TinySpec], Path]
) -> None:
    catalog = read_catalog(tiny_model(TinySpec()))
    digest = routers_digest(read_routers(catalog), tuple(catalog.by_layer))
    assert len(digest) == 32
    embedding = read_embedding(catalog)
    assert embedding is not None and embedding.ndim == 2
    model = RoutedModel.of_catalog(catalog, digest)
    beside = tmp_path / "beside"
    assert open_predictor("auto", catalog, [beside]) is None
    assert open_predictor("off", catalog, [beside]) is None
    with pytest.raises(PredictorMissingError, match="No predictor 'path' was trained"):
        open_predictor("path", catalog, [beside])
    windows = lawful_windows(12)
    layers, experts = model.shape
    assert layers <= 3 and experts <= 8, "the made-up routes fit the tiny model"
    found, _ = train(_fitted(windows, model), tokens=False)
    folder = beside / predictor_folder(model)
    save(folder, found)
    for option in ("auto", "table", "blend", str(folder), f"{folder}/table"):
        predictor = open_predictor(option, catalog, [tmp_path / "elsewhere", beside])
        assert predictor is not None
        assert predictor.name == ("table" if "table" in option else "blend")
    with pytest.raises(PredictorMissingError, match="'tokens' was not trained"):
        open_predictor("tokens", catalog, [beside])
    with pytest.raises(PredictorMissingError, match="holds no trained predictor"):
        open_predictor(str(tmp_path / "nowhere"), catalog, [])


def _fitted(windows: Any, model: RoutedModel) -> Any:
    from dataclasses import replace

    layers, experts = model.shape
    routes = windows.routes[:, :, :layers, : max(model.top_k)] % experts
    return replace(windows, model=model, routes=routes)
