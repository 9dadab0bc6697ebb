"""``expertier compare --engine vllm`` end to end on a small checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import strict_json
from expertier.cli import compare as compare_module
from expertier.cli.engines import get_adapter
from expertier.comparison.records import read_comparison
from support.tiny_hf import HfSpec, write_hf

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

ROOTS = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in ("plugin", "adapters"))


def test_several_requests_at_a_time_get_stocks_tokens_and_what_stand_ins_lose_is_measured_on_given_text(
    invoke: Callable[..., Any], invoke_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "find_confinement", lambda: (None, {"cgroup v1": "Permission denied"}))
    model, out = write_hf(tmp_path / "tiny", HfSpec()), tmp_path / "out"
    data = invoke_json(
        "compare", model, "--engine", "vllm", "--limit", "none", "--out", out, "--repeats", 1, "--tokens", 8,
        "--requests", 1, "--requests", 5, "--arms", "stock,expertier,expertier-quality-0.5", "--budget", "25%",
        "--quality-budget", "0.5", "--variant", "broken:budget=1KiB",
    )  # fmt: skip
    record = read_comparison(out / "comparison.json")
    assert record.complete and record.settings.requests == (1, 5)
    stock, ours, soft = (arm.runs[0].figures for arm in record.arms)
    assert soft is not None and soft.offload is not None and soft.quality is not None
    assert soft.quality.tokens == 4 and soft.quality.kl > 0 and soft.offload.bias == 0.5
    assert len(soft.offload.substituted) == record.model.layers and 0 < max(soft.offload.substituted) < 1
    assert soft.quality.exact_cross_entropy > 0
    assert stock is not None and ours is not None and ours.offload is not None
    assert len(set(ours.choices)) > 4  # the comparison is not one of silence with silence
    assert ours.choices == stock.choices
    assert data["summary"]["identity"]["same_logits"] is True
    assert ours.offload.budget_bytes == ours.offload.total_bytes // 4 >= ours.offload.peak_resident_bytes > 0
    assert ours.offload.hit_ratio is not None and ours.offload.hit_ratio < 1 and ours.read_bytes > 0
    for figures in (stock, ours):
        assert [(load.requests, load.tokens) for load in figures.loads] == [(1, 8), (5, 10)]
        assert [len(load.ttft_seconds) for load in figures.loads] == [4, 5]
        assert all(seconds > 0 for load in figures.loads for seconds in (*load.ttft_seconds, *load.token_seconds))
    text = invoke("report", out)
    assert "Every greedy token of Expertier is stock's" in text.stdout and "later p50/p99" in text.stdout


def test_a_budget_that_one_token_does_not_fit_into_is_refused_by_name_from_the_process_that_finds_it(
    invoke_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "find_confinement", lambda: (None, {}))
    data = invoke_json(
        "compare", write_hf(tmp_path / "tiny", HfSpec()), "--engine", "vllm", "--limit", "none", "--out", tmp_path,
        "--repeats", 1, "--tokens", 4, "--requests", 1, "--arms", "expertier-small", "--variant", "small:budget=1KiB",
    )  # fmt: skip
    [arm] = data["comparison"]["arms"]
    assert arm["status"] == "refused"
    assert arm["reason"].startswith("BudgetError: ")


def test_the_command_line_generates_text_with_vllm(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "tiny", HfSpec())
    arguments = ["run", str(model), "--engine", "vllm", "-p", "the quick", "-n", "8", "--temperature", "0", "--json"]
    done = subprocess.run(  # vLLM sets environment variables of the process it runs in
        [sys.executable, "-m", "expertier.cli", *arguments, "--budget", "50%"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOTS},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = strict_json(done.stdout)  # nothing of vLLM's own beside it
    assert answer["text"] and answer["stats"]["budget_bytes"] * 2 == answer["stats"]["total_bytes"]
    assert "(50 %)" in answer["mode"] and answer["tokens"] == 7 and answer["hit_ratio"] < 1


def test_files_that_vllm_does_not_load_are_refused_before_it_starts(invoke: Callable[..., Any], tmp_path: Path) -> None:
    from support.tiny_gguf import TinySpec, write_tiny

    model = write_tiny(tmp_path / "tiny.gguf", TinySpec())
    result = invoke("run", model, "--engine", "vllm", "--prompt", "x")
    assert result.exit_code == 2 and "gguf" in result.output
    assert any("gguf" in finding.text for finding in get_adapter("vllm").findings(compare_module.read_catalog(model)))
    refused = invoke("compare", model, "--requests", 4)
    assert refused.exit_code == 2 and "--requests" in refused.output


def test_schedulers_serve_the_same_requests_in_turns_in_one_engine(
    invoke_json: Callable[..., Any], tmp_path: Path
) -> None:
    data = invoke_json(
        "compare", write_hf(tmp_path / "tiny", HfSpec()), "--engine", "vllm", "--scheduler", "greedy", "--scheduler",
        "domains", "--out", tmp_path / "out", "--repeats", 1, "--batch", 2, "--requests", 6, "--prompt", "4:8",
        "--output", "2:5", "--budget", "50%", "--lookahead", "off", "--threads", 1,
    )  # fmt: skip
    runs = data["traffic"]["runs"]
    assert [run["arm"] for run in runs] == ["fcfs", "greedy", "domains"]
    assert all(run["loads_per_token"] > 0 and run["tokens_per_second"] > 0 for run in runs)
    assert runs[0]["most_overtaken"] == 0
