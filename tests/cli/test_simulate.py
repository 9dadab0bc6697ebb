"""``expertier profile``, ``simulate`` and ``report`` of traces, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from expertier.cli.profile import Measured
from expertier.errors import ExpertierError
from expertier.routing.recorder import TraceRecorder
from expertier.routing.saved import save
from expertier.routing.train import train
from expertier.routing.windows import read_windows
from expertier.simulation import sweep
from expertier.simulation.sweep import read_simulation
from support.lawful import lawful_trace
from support.tiny_gguf import TinySpec
from support.traces import header, skewed_routes, write_trace

Invoke = Callable[..., Result]
TinyModel = Callable[[TinySpec], Path]
TEXT = "Some words of a text that is long enough to be read. " * 8


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace of 120 tokens without notes about speed."""
    path = tmp_path / "routes.trace"
    shape = header(3, 16, 2)
    write_trace(path, shape, skewed_routes(shape, 120))
    return path


def test_a_simulation_has_every_policy_at_every_budget_and_belady_besides(
    invoke_json: Callable[..., Any], tmp_path: Path, trace: Path
) -> None:
    out = tmp_path / "out"
    result = invoke_json(
        "simulate", trace, "--budget", "25%", "--budget", "50%", "--policy", "lru", "--policy", "lfu:8", "--out", out,
        "--bandwidth", "1MB/s", "--compute-ms", "5", "--prefetch", "perfect", "--jobs", "1",
    )  # fmt: skip
    arms = result["simulation"]["arms"]
    assert [(arm["budget_text"], arm["label"]) for arm in arms] == [
        (budget, label) for budget in ("25%", "50%") for label in ("lru", "lfu:8", "lru + perfect", "belady")
    ]
    for group in (arms[:4], arms[4:]):
        lru, lfu, perfect, belady = group
        assert max(lru["hit_ratio"], lfu["hit_ratio"]) <= belady["hit_ratio"]
        assert lru["seconds"]["bound"] <= lru["seconds"]["one_layer"] <= lru["seconds"]["demand"]
        assert perfect["prefetch_seconds"] < lru["seconds"]["demand"]
    assert arms[0]["bytes_per_token"] == pytest.approx(arms[0]["loads_per_token"] * 4096)
    assert (out / "simulation.png").stat().st_size > 10_000
    assert len(read_simulation(out / "simulation.json").arms) == 8


def test_a_trained_predictor_tells_the_policy_and_loads_ahead(
    invoke_json: Callable[..., Any], invoke: Invoke, tmp_path: Path, trace: Path
) -> None:
    lawful = lawful_trace(tmp_path / "lawful.trace")
    windows, _ = read_windows([lawful], width=12)
    save(tmp_path / "predictor", train(windows, tokens=False)[0])
    arguments = (
        "--budget", "50%", "--policy", "predictive", "--policy", "lru", "--predictor", tmp_path / "predictor",
        "--bandwidth", "1MB/s", "--compute-ms", "20", "--jobs", "1",
    )  # fmt: skip
    result = invoke_json("simulate", lawful.path, *arguments, "--prefetch", "blend", "--out", tmp_path / "out")
    forecast, _, loading, belady = result["simulation"]["arms"]
    assert [arm["label"] for arm in (forecast, loading)] == ["predictive by blend", "predictive + blend"]
    assert forecast["hit_ratio"] < belady["hit_ratio"]
    assert loading["ahead_share"] > 0.05
    assert loading["prefetch_seconds"] < forecast["seconds"]["demand"]
    alone = invoke_json("simulate", lawful.path, "--budget", "50%", "--policy", "predictive", "--jobs", "1")
    assert alone["simulation"]["arms"][0]["hit_ratio"] != forecast["hit_ratio"]
    refused = invoke("simulate", trace, *arguments)
    assert refused.exit_code == 2
    assert "was trained for" in refused.stderr


def test_several_processes_find_what_one_finds(
    invoke_json: Callable[..., Any], tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_SMALL_BYTES", 0)
    found = [
        invoke_json("simulate", trace, "--budget", "30%", "--jobs", jobs, "--out", tmp_path / jobs)["simulation"][
            "arms"
        ]
        for jobs in ("1", "2")
    ]
    assert found[0] == found[1]


def test_the_table_says_what_share_of_the_gap_a_policy_closes(invoke: Invoke, tmp_path: Path, trace: Path) -> None:
    result = invoke("simulate", trace, "--budget", "25%", "--out", tmp_path / "out", "--jobs", "1")
    assert result.exit_code == 0, result.output
    assert "of the LRU-Belady gap" in result.stdout
    assert "belady" in result.stdout
    assert "speeds unknown; give --bandwidth and --compute-ms" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "1"), "cannot hold the largest working set"),
        (("--budget", "auto"), "needs a budget in figures"),
        (("--policy", "mru"), "no eviction policy 'mru'"),
        (("--policy", "lru:3"), "has no half-life"),
        (("--policy", "lfu:x"), "not a half-life"),
        (("--prefetch", "magic", "--bandwidth", "1GB", "--compute-ms", "1"), "no predictor 'magic'"),
        (("--prefetch", "perfect"), "speeds are unknown"),
        (("--prefetch", "blend"), "--predictor"),
        (("--prefetch", "lookahead"), "Give --model"),
        (("--prefetch", "path+perfect"), "no predictor 'perfect'"),
        (("--prefetch", "path+table"), "names two trained predictors"),
        (("--policy", "predictive", "--predictor", "nowhere"), "no trained predictor"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_words(
    invoke: Invoke, trace: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = invoke("simulate", trace, "--jobs", "1", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("command", ["simulate", "report"])
def test_bad_traces_are_refused_in_words(invoke: Invoke, tmp_path: Path, trace: Path, command: str) -> None:
    whole = trace.read_bytes()

    def said(content: bytes, *arguments: str) -> str:
        path = tmp_path / "bad.trace"
        path.write_bytes(content)
        result = invoke(command, path, *arguments)
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "not a trace" in said(b"hello")
    assert "newer Expertier" in said(whole[:8] + b"\x09" + whole[9:])
    assert "damaged" in said(whole[:-100] + b"\x00" + whole[-99:])
    assert "without an end mark" in said(whole[:-60])
    assert "no token" in said(whole[:600], "--partial")
    shape = header(3, 16, 2)
    (tmp_path / "one").unlink(missing_ok=True)
    write_trace(tmp_path / "one", shape, skewed_routes(shape, 1))
    assert "a single token" in said((tmp_path / "one").read_bytes())


def test_a_killed_recording_can_be_simulated_as_far_as_it_is_intact(
    invoke_json: Callable[..., Any], tmp_path: Path
) -> None:
    shape = header(3, 16, 2)
    path = tmp_path / "killed.trace"
    recorder = TraceRecorder(path, shape)
    for token in skewed_routes(shape, 30):
        recorder.begin_step("decode", requests=0, positions=[0])
        for layer in shape.layers:
            recorder.record(layer.layer, token[layer.layer][None])
        recorder.end_step()
    recorder.flush()
    path.with_suffix(".copy").write_bytes(path.read_bytes()[:])
    recorder.close()
    result = invoke_json("simulate", path.with_suffix(".copy"), "--partial", "--budget", "50%", "--jobs", "1")
    assert result["simulation"]["tokens"] == 30


def test_a_simulation_against_another_model_is_refused(invoke: Invoke, trace: Path, tiny_model: TinyModel) -> None:
    result = invoke("simulate", trace, "--model", tiny_model(TinySpec()))
    assert result.exit_code == 2
    assert "is a trace of tiny.gguf" in result.stderr


def test_a_report_of_a_trace_is_one_page_that_needs_nothing_else(
    invoke_json: Callable[..., Any], tmp_path: Path, trace: Path
) -> None:
    with TraceRecorder(trace, header(3, 16, 2)) as recorder:
        recorder.note({"compute_seconds_per_step": 0.01, "disk": {"random": 1e9}, "expert_share": 0.9})
    result = invoke_json("report", trace, "--out", tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(result["pictures"]) == 4
    assert "http" not in page
    assert all(0 < item["entropy"] <= 4 for item in result["skew"])
    assert all(0.25 < item["hottest_quarter"] <= 1 for item in result["skew"])
    hits = {(arm["label"], arm["budget_text"]): arm["hit_ratio"] for arm in result["arms"]}
    assert hits["belady", "25%"] > hits["lru", "25%"]


def test_a_report_shows_whether_a_predictors_chances_are_true(
    invoke_json: Callable[..., Any], invoke: Invoke, tmp_path: Path, trace: Path
) -> None:
    lawful = lawful_trace(tmp_path / "lawful.trace")
    windows, _ = read_windows([lawful], width=12)
    save(tmp_path / "predictor", train(windows, tokens=False)[0])
    result = invoke_json("report", lawful.path, "--predictor", tmp_path / "predictor", "--out", tmp_path / "page")
    assert Path(result["pictures"][-1]).name == "calibration.png"
    assert (tmp_path / "page" / "calibration.png").stat().st_size > 10_000
    given = result["calibration"]["before layer 0"]
    used = [share for chance, share, count in given if count >= 100]
    assert used == sorted(used), "what is likelier is used more often"
    refused = invoke("report", trace, "--predictor", tmp_path / "predictor", "--out", tmp_path / "no")
    assert refused.exit_code == 2 and "no token ids" in refused.stderr, refused.output


def test_a_part_of_a_trace_is_simulated_with_the_speeds_at_its_end(
    invoke_json: Callable[..., Any], tmp_path: Path, trace: Path
) -> None:
    with TraceRecorder(trace, header(3, 16, 2)) as recorder:
        recorder.note({"compute_seconds_per_step": 0.01, "disk": {"random": 1e9}})
    result = invoke_json("simulate", trace, "--budget", "50%", "--tokens", "50", "--out", tmp_path / "out")
    assert result["simulation"]["tokens"] == 50
    assert result["simulation"]["timing"]["bandwidth"] == 1e9


def test_a_trace_whose_notes_are_nonsense_is_simulated_without_speeds(
    invoke_json: Callable[..., Any], tmp_path: Path, trace: Path
) -> None:
    with TraceRecorder(trace, header(3, 16, 2)) as recorder:
        recorder.note({"compute_seconds_per_step": "fast", "disk": {"random": -1}, "expert_share": [1]})
    result = invoke_json("simulate", trace, "--budget", "50%", "--out", tmp_path / "out", "--jobs", "1")
    assert result["simulation"]["timing"] is None


def test_compute_is_told_apart_from_what_loads_cost() -> None:
    loads = np.random.default_rng(0).integers(0, 20, 200)
    stall = loads * 0.01
    measured = Measured(seconds=(0.02 + 0.0005 * loads + stall).tolist(), stall=stall.tolist(), loads=loads.tolist())
    assert measured.costs() == pytest.approx({"compute_seconds_per_step": 0.02, "load_cost_seconds": 0.0005})
    idle = Measured(seconds=[0.02] * 50, stall=[0.0] * 50, loads=[0] * 50)
    assert idle.costs() == {"compute_seconds_per_step": 0.02, "load_cost_seconds": 0.0}
    assert Measured(seconds=[1.0], stall=[0.0], loads=[0]).costs() == {}


def test_a_record_of_something_else_is_no_simulation(tmp_path: Path) -> None:
    for content in ("", "[]", "{}", json.dumps({"schema": "expertier-simulation/1"})):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ExpertierError, match="not the record of a simulation"):
            read_simulation(tmp_path / "x.json")


@pytest.mark.engine
def test_profiling_records_every_token_and_no_text(
    invoke_json: Callable[..., Any], invoke: Invoke, tmp_path: Path, tiny_model: TinyModel
) -> None:
    pytest.importorskip("llama_cpp")
    model = tiny_model(TinySpec(layers=3, experts=16, skew=0.7))
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([{"domain": name, "text": TEXT + name} for name in "aabb"]))
    out = tmp_path / "profile.trace"
    result = invoke_json(
        "profile", model, "--text", texts, "--out", out, "--tokens", "150", "--tokens-per-text", "60", "--prompt", "4",
        "--budget", "50%", "--threads", "1",
    )  # fmt: skip
    assert (result["tokens"], result["requests"], result["token_ids"]) == (150, 3, False)
    assert result["steps"] == 150 - 3 * 3
    assert result["notes"]["compute_seconds_per_step"] > 0
    assert result["notes"]["disk"]["random"] > 0
    assert b"words" not in out.read_bytes()
    simulated = invoke_json(
        "simulate", out, "--budget", "50%", "--out", tmp_path / "out", "--jobs", "1", "--model", model
    )
    assert simulated["simulation"]["timing"]["bandwidth"] > 0
    assert invoke("profile", model, "--out", out).exit_code == 2
    (tmp_path / "empty").write_text(" \n")
    for arguments, words in (((), "no text to profile"), (("--text", tmp_path / "empty"), "no text in empty")):
        refused = invoke("profile", model, "--out", out, *arguments)
        assert refused.exit_code == 2
        assert words in refused.stderr
