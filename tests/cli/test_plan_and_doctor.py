"""``expertier plan``, ``expertier doctor`` and what they are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import Result

from expertier.catalog.gguf import read_gguf
from expertier.cli import engines
from expertier.cli.app import app
from expertier.cli.engines import find_adapters, get_adapter
from expertier.config import OffloadOptions
from expertier.errors import BudgetError, ExpertLoadError, ModelFormatError, UnsupportedEngineError
from expertier.planning.calibrate import DiskSpeed, measure_disk
from expertier.planning.demand import read_demand
from expertier.planning.memory import MemoryLimit
from expertier.planning.plan import make_plan
from expertier.storage import PAGE
from support.tiny_gguf import TinySpec
from support.tiny_hf import HfSpec, write_hf

Invoke = Callable[..., Result]
TinyModel = Callable[[TinySpec], Path]
ROOMY = [MemoryLimit(source="machine", limit=1 << 40, left=1 << 40)]
DISK = DiskSpeed(direct=True, sequential=2e9, random=1e9, read_bytes=4096, threads=2, measured_bytes=1 << 20)


@pytest.mark.parametrize("command", ["plan", "run", "compare"])
def test_every_option_of_the_table_is_a_flag_with_its_help(command: str) -> None:
    parameters = {parameter.name: parameter for parameter in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    for option in fields(OffloadOptions):
        if (command, option.name) == ("compare", "quality_budget"):
            continue  # adds an arm there, and may be repeated
        flag = parameters[option.name]
        assert flag.opts == ["--" + option.name.replace("_", "-")]
        assert flag.help.replace("\\", "").startswith(option.metadata["help"])
        assert flag.default is None


def test_a_plan_counts_experts_bytes_and_the_floor_of_uniform_routing(tiny_model: TinyModel) -> None:
    catalog = read_gguf(tiny_model(TinySpec(layers=4, experts=8, top_k=2)))
    plan = make_plan(catalog, "50%", limits=ROOMY, disk=DISK, n_ubatch=16)
    expert = catalog.largest_expert_bytes
    assert plan.budget_bytes == 16 * expert
    assert (plan.resident_experts, plan.total_experts) == (16, 32)
    assert plan.token_bytes == 4 * 2 * expert
    assert plan.uniform_hit_ratio == 0.5
    assert plan.uniform_missed_bytes == 4 * expert
    assert plan.uniform_tokens_per_second == pytest.approx(1e9 / (4 * expert))
    assert plan.smallest_bytes == 2 * expert
    assert plan.full_step_bytes == 8 * expert
    assert plan.safe_ubatch == 16  # all experts of a layer fit


def test_a_plan_knows_the_prompt_step_that_surely_fits_a_small_budget(tiny_model: TinyModel) -> None:
    catalog = read_gguf(tiny_model(TinySpec(experts=8, top_k=2)))
    plan = make_plan(catalog, 5 * catalog.largest_expert_bytes, limits=ROOMY)
    assert plan.safe_ubatch == 2


def test_a_plan_for_everything_reads_nothing(tiny_model: TinyModel) -> None:
    catalog = read_gguf(tiny_model(TinySpec()))
    for budget in ("100%", 1 << 39, "auto"):
        plan = make_plan(catalog, budget, limits=ROOMY, disk=DISK)
        assert plan.budget_bytes == plan.total_bytes
        assert plan.uniform_missed_bytes == 0
        assert plan.uniform_tokens_per_second is None
        assert not plan.budget_is_estimate


def test_budget_auto_leaves_room_for_the_other_weights_and_a_margin(tiny_model: TinyModel) -> None:
    catalog = read_gguf(tiny_model(TinySpec()))
    left = catalog.other_bytes + catalog.total_expert_bytes // 2 + (8 << 20)
    limits = [MemoryLimit(source="/sys/fs/cgroup/x", limit=left, left=left), *ROOMY]
    plan = make_plan(catalog, "auto", limits=limits, margin=8 << 20)
    assert plan.budget_bytes == catalog.total_expert_bytes // 2
    assert plan.budget_is_estimate


@pytest.mark.parametrize(
    ("budget", "left", "named"),
    [
        ("1KiB", 1 << 40, "one token"),
        ("auto", 1 << 20, "leaves"),
        ("100%", 1 << 20, "left"),
    ],
)
def test_an_impossible_budget_is_refused_by_name(tiny_model: TinyModel, budget: str, left: int, named: str) -> None:
    catalog = read_gguf(tiny_model(TinySpec()))
    limits = [MemoryLimit(source="machine", limit=left, left=left)]
    with pytest.raises(BudgetError, match=named) as caught:
        make_plan(catalog, budget, limits=limits)
    assert caught.value.remedy


def test_the_plan_command_measures_the_storage_and_says_that_there_is_no_profile(
    invoke: Invoke, invoke_json: Callable[..., Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(TinySpec())
    data = invoke_json("plan", model, "--budget", "50%", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == data
    assert data["model"]["fingerprint"] == read_gguf(model).fingerprint
    assert data["plan"]["disk"]["random"] > 0
    assert data["profile"] is None
    text = invoke("plan", model, "--budget", "50%", "--no-disk").stdout
    assert "no profile of this model" in " ".join(text.split())


@pytest.mark.engine
def test_with_recorded_routes_a_plan_tells_what_every_budget_gives_and_writes_it_down(
    invoke: Invoke, invoke_json: Callable[..., Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(TinySpec(layers=3, experts=16, top_k=2, skew=0.7))
    text = tmp_path / "text.txt"
    text.write_text("A budget is a promise. " * 40)
    trace, config, out = tmp_path / "trace", tmp_path / "options.json", tmp_path / "out"
    invoke_json("profile", model, "--text", text, "--out", trace, "--tokens", 200, "--threads", 1, "--budget", "75%")
    common = ("plan", model, "--routes", trace, "--budget", "50%", "--no-disk", "--threads", 1, "--out", out)
    recorded = invoke_json(*common)["profile"]["trade_off"]["chosen"]
    assert recorded["tokens_per_second"] > 0  # with the speeds that were met while recording
    data = invoke_json(*common, "--calibrate", "--apply", config)
    found = data["profile"]["trade_off"]
    assert found["chosen"]["budget_bytes"] <= data["plan"]["total_bytes"]
    assert 0 < found["chosen"]["hit_ratio"] < 1
    assert found["chosen"]["tokens_per_second"] > 0
    assert found["curve"][-1]["loads_per_token"] == 0
    assert sum(found["layers"]["slots"]) == 24
    assert json.loads((out / "plan.json").read_text())["profile"]["trade_off"] == found
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert OffloadOptions.from_mapping({"config": str(config)}).budget == found["chosen"]["budget_bytes"]
    again = invoke(*common)
    assert again.exit_code == 0, again.output
    assert "asked for" in again.stdout and "tok/s" in again.stdout  # speeds were kept
    invoke_json(*common, "--policy", "lru")
    assert read_demand(tmp_path / "trace.lru.demand.json").policy == "lru"
    mixed = invoke(*common, "--policy", "lru", "--routes", tmp_path / "trace.demand.json")
    assert mixed.exit_code == 2 and "under the policy lfu, not lru" in " ".join(mixed.stderr.split())
    other = tiny_model(TinySpec(layers=2, experts=8, top_k=2))
    refused = invoke("plan", other, "--routes", trace, "--no-disk")
    assert refused.exit_code == 2
    assert "another model" in " ".join(refused.output.split()) or "not of" in " ".join(refused.output.split())


@pytest.mark.parametrize("files", [1, 3])
def test_a_plan_for_a_hugging_face_checkpoint(
    invoke: Invoke, invoke_json: Callable[..., Any], tmp_path: Path, files: int
) -> None:
    spec = HfSpec(family="mixtral", files=files)
    model = write_hf(tmp_path / "m", spec)
    data = invoke_json("plan", model, "--budget", "50%")
    assert data["model"]["architecture"] == "mixtral"
    assert data["plan"]["total_experts"] == spec.layers * spec.experts
    assert data["plan"]["budget_bytes"] == spec.layers * spec.experts * 3 * 2 * spec.hidden * spec.intermediate // 2
    assert "16 experts each, 4 per token" in " ".join(invoke("plan", model, "--no-disk").stdout.split())
    (model / "config.json").unlink()
    refused = invoke("plan", model)
    assert refused.exit_code == 2
    assert "has no config.json" in " ".join(refused.output.split())


def test_budget_from_the_environment_is_used_and_a_flag_beats_it(
    invoke_json: Callable[..., Any], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(TinySpec())
    monkeypatch.setenv("EXPERTIER_BUDGET", "50%")
    assert invoke_json("plan", model, "--no-disk")["plan"]["asked"] == "50%"
    assert invoke_json("plan", model, "--no-disk", "--budget", "75%")["plan"]["asked"] == "75%"


def test_storage_is_measured_with_reads_of_an_expert(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(3 << 20))
    speed = measure_disk([path], read_bytes=300_000, most_bytes=4 << 20)
    assert speed.sequential > 0 and speed.random > 0
    assert speed.best == max(speed.sequential, speed.random)
    assert speed.read_bytes % PAGE == 0 and speed.read_bytes >= 300_000
    assert speed.measured_bytes >= 2 * (4 << 20) - speed.read_bytes


def test_a_file_smaller_than_an_expert_is_measured_in_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(2 * PAGE))
    assert measure_disk([path], read_bytes=1 << 20, most_bytes=1 << 20).read_bytes == 2 * PAGE
    path.write_bytes(b"x")
    with pytest.raises(ModelFormatError, match="too small"):
        measure_disk([path], read_bytes=1 << 20)


def test_a_read_that_fails_while_measuring_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8 * PAGE))

    def fail(*_: object) -> None:
        raise ExpertLoadError("The disk is gone.")

    from expertier.planning import calibrate

    monkeypatch.setattr(calibrate.StorageFile, "read_into", fail)
    with pytest.raises(ExpertLoadError, match="gone"):
        calibrate._random(calibrate.StorageFile(path), 8 * PAGE, PAGE, 2, 1 << 20, 1.0)


@pytest.mark.engine
def test_the_doctor_finds_the_engine_and_measures_the_storage(
    invoke_json: Callable[..., Any], tiny_model: TinyModel
) -> None:
    data = invoke_json("doctor", tiny_model(TinySpec()))
    topics = {finding["topic"]: finding for finding in data["findings"]}
    assert {"llama.cpp", "kernel", "storage", "O_DIRECT", "memory", "memory limits", "mappings", "model"} <= set(topics)
    assert all(finding["text"] for finding in data["findings"])
    assert data["disk"]["sequential"] > 0


@pytest.mark.engine
def test_the_doctor_reads_a_hugging_face_checkpoint(invoke_json: Callable[..., Any], tmp_path: Path) -> None:
    findings = invoke_json("doctor", write_hf(tmp_path / "m", HfSpec()))["findings"]
    model = next(finding for finding in findings if finding["topic"] == "model")
    assert "qwen3_moe: 48 experts (BF16) in 3 layers" in model["text"]
    said = [finding for finding in findings if "does not load safetensors" in finding["text"]]
    assert [finding["topic"] for finding in said] == ["llama.cpp"]


@pytest.mark.engine
def test_the_doctor_works_without_a_model(invoke: Invoke) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "cache directory" in result.stdout


def test_the_doctor_says_what_would_be_refused(invoke: Invoke, dense_model: Path) -> None:
    result = invoke("doctor", dense_model)
    assert result.exit_code == 2
    assert "NotMoEError" in result.stdout
    assert "Traceback" not in result.output


def test_the_doctor_calls_a_missing_engine_a_problem(
    invoke: Invoke, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for adapter in find_adapters()[0].values():
        monkeypatch.setattr(type(adapter), "versions", lambda self: {})
    result = invoke("doctor", tiny_model(TinySpec()))
    assert result.exit_code == 2
    told = " ".join(result.stdout.split())
    assert "pip install 'expertier[llamacpp]'" in told
    assert "CPU build: python examples/setup/install_vllm.py" in told  # what pip calls vllm is the CUDA build
    for name in ("llamacpp", "vllm"):
        with pytest.raises(UnsupportedEngineError, match="not installed"):
            get_adapter(name)


def test_an_adapter_that_cannot_be_imported_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_MODULES", {"broken": "expertier_no_such_adapter:ADAPTER"})
    monkeypatch.setattr(engines.importlib.metadata, "entry_points", lambda group: ())
    assert "expertier_no_such_adapter" in find_adapters()[1]["broken"]
    with pytest.raises(UnsupportedEngineError, match="cannot be loaded"):
        get_adapter("broken")


def test_stock_is_also_measured_repacked_only_where_something_can_be_repacked(tiny_model: TinyModel) -> None:
    adapter = get_adapter("llamacpp")
    plain = read_gguf(tiny_model(TinySpec(expert_type="F16")))
    packed = read_gguf(tiny_model(TinySpec(expert_type="Q4_K")))
    assert len(adapter.stock_variants(plain, limited=True)) == 1
    assert {variant.settings["repack"] for variant in adapter.stock_variants(packed, limited=True)} == {False, True}
    assert adapter.stock_variants(packed, limited=False)[0].settings["repack"]
