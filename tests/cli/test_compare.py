"""``expertier compare`` end to end on small models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from expertier.cli import compare as compare_module
from expertier.comparison.limits import find_confinement
from expertier.comparison.records import read_comparison
from support.tiny_gguf import TinySpec, write_tiny

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engine

Invoke = Callable[..., Result]
TinyModel = Callable[[TinySpec], Path]
ROOTS = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in ("plugin", "adapters"))
MANY = ("--limit", "none", "--repeats", "50", "--tokens", "8", "--threads", "1")
FAST = ("--repeats", 1, "--tokens", 8, "--threads", 1)


def test_without_the_right_to_limit_memory_the_unlimited_arms_run_and_the_others_say_why(
    invoke: Invoke,
    invoke_json: Callable[..., Any],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_module, "find_confinement", lambda: (None, {"cgroup v1": "Permission denied"}))
    out = tmp_path / "out"
    model = tiny_model(TinySpec(expert_type="F16"))
    data = invoke_json("compare", model, "--limit", "50%", "--limit", "none", "--out", out, *FAST)
    record = read_comparison(out / "comparison.json")
    assert record.complete
    arms = {(arm.limit, arm.key): arm for arm in record.arms}
    assert all(arm.status == ("not run" if limit == "50%" else "ok") for (limit, _), arm in arms.items())
    assert "Permission denied" in arms["50%", "expertier"].reason
    stock, ours = arms["none", "stock"].runs[0], arms["none", "expertier"].runs[0]
    assert stock.figures is not None and ours.figures is not None and ours.figures.offload is not None
    assert stock.figures.logits_digest == ours.figures.logits_digest
    assert len(ours.figures.token_seconds) == 8
    assert ours.figures.offload.hit_ratio == 1.0
    assert data["summary"]["identity"]["same_logits"] is True
    assert record.settings.domains == ("python", "python_numbers", "python_text", "python_net")
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"

    # The report is made from the record alone.
    (out / "comparison.png").unlink()
    refused = invoke("report", out, "--predictor", out)
    assert refused.exit_code == 2 and "--predictor needs a trace" in refused.stderr
    text = invoke("report", out)
    assert text.exit_code == 0, text.output
    assert "bit-identical" in text.stdout and "Permission denied" in text.stdout
    assert (out / "comparison.png").exists()
    for named in (out, out / "comparison.json"):
        assert invoke_json("report", named)["summary"] == data["summary"]


def test_repacked_kernels_are_compared_with_repacked_kernels(
    invoke_json: Callable[..., Any], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "find_confinement", lambda: (None, {}))
    model = tiny_model(TinySpec(expert_type="Q4_K"))
    variant = ("--variant", "plain:repack=off,policy=lru")
    data = invoke_json("compare", model, "--limit", "none", "--out", tmp_path / "out", *variant, *FAST)
    kernels = {arm["key"]: arm["runs"][0]["figures"]["kernels"] for arm in data["comparison"]["arms"]}
    assert kernels["expertier-plain"] == kernels["stock-plain"] == "plain"
    assert kernels["stock"] == kernels["expertier"] == "repacked"
    assert data["summary"]["identity"]["same_logits"] is True
    assert data["summary"]["identity"]["agreement"] is not None


def test_lossy_arms_are_marked_measured_and_no_part_of_the_equality(
    invoke: Invoke,
    invoke_json: Callable[..., Any],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_module, "find_confinement", lambda: (None, {}))
    out = tmp_path / "out"
    given = ("--limit", "none", "--budget", "50%", "--quality-budget", "0", "--quality-budget", "0.4", "--out", out)
    data = invoke_json("compare", tiny_model(TinySpec(experts=16, expert_type="F16")), *given, *FAST, "--tokens", 64)
    arms = {arm["key"]: arm for arm in data["comparison"]["arms"]}
    assert [key for key, arm in arms.items() if arm["lossy"]] == ["expertier-quality-0.4"]
    figures = {key: arm["runs"][0]["figures"] for key, arm in arms.items()}
    assert figures["expertier-quality-0"]["logits_digest"] == figures["stock"]["logits_digest"]
    assert figures["expertier-quality-0.4"]["logits_digest"] != figures["stock"]["logits_digest"]
    found = figures["expertier-quality-0.4"]["quality"]
    assert found["kl"] > 0 and found["agreement"] <= 1
    assert found["increase"]["low"] <= found["increase"]["middle"] <= found["increase"]["high"]
    offload = figures["expertier-quality-0.4"]["offload"]
    assert offload["bias"] == 0.4 and max(offload["substituted"]) > 0
    assert offload["read_bytes_per_token"] < found["exact_read_bytes_per_token"]
    identity = data["summary"]["identity"]
    assert identity["same_logits"] is True and identity["lossy_arms"] == 1
    text = invoke("report", out)
    assert "lossy" in text.stdout and "what lossy arms lost" in text.stdout and "no part of this" in text.stdout


def test_a_percentage_without_a_profile_is_refused_before_anything_runs(
    invoke: Invoke, tiny_model: TinyModel, tmp_path: Path
) -> None:
    result = invoke("compare", tiny_model(TinySpec()), "--quality-budget", "1%", "--out", tmp_path / "out", *FAST)
    assert result.exit_code == 2
    assert "expertier profile" in result.output


def test_a_budget_that_is_too_small_is_the_status_of_its_arm(
    invoke_json: Callable[..., Any], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "find_confinement", lambda: (None, {}))
    data = invoke_json(
        "compare", tiny_model(TinySpec()), "--limit", "none", "--out", tmp_path, *FAST,
        "--arms", "expertier-tiny", "--variant", "tiny:budget=1KiB",
    )  # fmt: skip
    [arm] = data["comparison"]["arms"]
    assert arm["status"] == "refused"
    assert "BudgetError" in arm["reason"]


@pytest.fixture
def larger_model(tmp_path: Path) -> Iterator[Path]:
    """About 100 MB, so that a limit can bind although an interpreter needs memory, too."""
    path = write_tiny(
        tmp_path / "larger.gguf",
        TinySpec(layers=4, experts=16, top_k=2, hidden=256, feed_forward=1024, expert_type="F16"),
    )
    yield path
    path.unlink()


@pytest.mark.root
def test_under_a_real_limit_both_engines_stay_below_it_and_agree(
    invoke: Invoke, invoke_json: Callable[..., Any], larger_model: Path, tmp_path: Path
) -> None:
    way, reasons = find_confinement()
    if way is None:
        pytest.skip(f"no memory limit can be set here: {reasons}")
    limit = 208 << 20
    data = invoke_json(
        "compare", larger_model, "--limit", "208MiB", "--limit", "24MiB", "--out", tmp_path / "out",
        "--arms", "stock-readahead,stock,expertier", *FAST,
    )  # fmt: skip
    for arm in data["comparison"]["arms"]:
        if arm["limit"] == "24MiB":
            assert arm["status"] in ("killed", "not run"), arm
        elif arm["status"] != "not run":
            assert arm["status"] == "ok", arm
            peak = arm["runs"][0]["peak_memory_bytes"]
            assert peak is None or 0 < peak <= limit
    assert data["summary"]["identity"]["same_logits"] is True
    assert invoke("report", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_stops_its_worker_and_keeps_what_it_has(
    tiny_model: TinyModel, tmp_path: Path, number: signal.Signals
) -> None:
    out, model = tmp_path / "out", tiny_model(TinySpec(expert_type="F16"))
    running = subprocess.Popen(
        [sys.executable, "-m", "expertier.cli", "compare", str(model), "--out", str(out), *MANY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOTS},
    )
    deadline = time.monotonic() + 120
    while not (out / "comparison.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(number)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "Traceback" not in output + errors
    assert errors.strip().splitlines()[-1] == "Interrupted."
    record = read_comparison(out / "comparison.json")
    assert not record.complete
    assert any(arm.runs for arm in record.arms)
    children = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(out) in _read(path)]
    assert not children


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_an_ablation_adds_one_part_at_a_time_and_ends_with_bounds(
    invoke: Invoke,
    invoke_json: Callable[..., Any],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_module, "find_confinement", lambda: (None, {}))
    model = tiny_model(TinySpec(expert_type="F16"))
    given = ("--limit", "none", "--repeats", 1, "--tokens", 40, "--threads", 1, "--out", tmp_path / "out")
    data = invoke_json("compare", model, "--ablate", *given)
    arms = {arm["key"]: arm for arm in data["comparison"]["arms"]}
    assert list(arms) == ["stock", *(f"expertier-{name}" for name in ("on demand", "+ LRU", "+ policy", "+ lookahead"))]
    assert data["summary"]["identity"]["same_logits"] is True
    read = [arm["read_bytes_per_token"] for arm in data["summary"]["arms"] if arm["key"] == "expertier-on demand"]
    assert read[0] is not None
    assert "not trained, and so left out: table, path, blend" in " ".join(data["comparison"]["notes"])
    bounds = data["comparison"]["bounds"]
    assert len(bounds) == 4
    assert all(bound["tokens_per_second"] > 0 and bound["limit"] == "none" for bound in bounds)
    text = invoke("report", tmp_path / "out")
    assert "bound: Belady, storage never idle" in text.stdout


def test_an_ablation_with_a_predictor_that_is_not_there_is_refused(
    invoke: Invoke, tiny_model: TinyModel, tmp_path: Path
) -> None:
    result = invoke("compare", tiny_model(TinySpec()), "--ablate", "--predictor", tmp_path / "absent")
    assert result.exit_code == 2
    assert "no trained predictor" in result.output.lower() or "holds no" in result.output
