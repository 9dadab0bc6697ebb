"""What cannot be is refused by name, before anything is loaded where possible."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertier.errors import (
    ExpertierError,
    NotMoEError,
    UnsupportedEngineError,
    UnsupportedModelError,
    UnsupportedOptionError,
)
from expertier_vllm.refusals import ServerFacts, check_server
from expertier_vllm.stage import ExpertStage
from support.tiny_hf import HfSpec, write_hf
from support.vllm_process import engine, error_of, run

GOOD = ServerFacts(platform="cpu", model="some/model", experts=8)
SPEC = HfSpec(layers=2)


def test_a_plain_server_is_not_refused() -> None:
    check_server(GOOD)
    for load_format in ("auto", "hf", "safetensors"):
        check_server(dataclasses.replace(GOOD, load_format=load_format, load_strategy="lazy"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"experts": 0}, NotMoEError, "some/model has no routed experts"),
        ({"platform": "rocm"}, UnsupportedEngineError, "on rocm"),
        ({"expert_parallel": True}, UnsupportedOptionError, "--enable-expert-parallel"),
        ({"expert_parallel": True, "eplb": True}, UnsupportedOptionError, "--enable-eplb"),
        ({"data_parallel": 2}, UnsupportedOptionError, "--data-parallel-size"),
        ({"context_parallel": 2}, UnsupportedOptionError, "Context parallelism"),
        ({"micro_batches": True}, UnsupportedOptionError, "--enable-dbo"),
        ({"virtual": True, "tensor_parallel": 2}, UnsupportedOptionError, "--tensor-parallel-size 2"),
        ({"elastic": True}, UnsupportedOptionError, "Elastic"),
        ({"second_runner": True}, UnsupportedOptionError, "model runner V2"),
        ({"lora": True}, UnsupportedOptionError, "--enable-lora"),
        ({"speculative": True}, UnsupportedOptionError, "Speculative decoding"),
        ({"sleep_mode": True}, UnsupportedOptionError, "--enable-sleep-mode"),
        ({"weight_offload": True}, UnsupportedOptionError, "--cpu-offload-gb"),
        ({"load_format": "dummy"}, UnsupportedOptionError, "--load-format dummy"),
        ({"load_format": "runai_streamer"}, UnsupportedOptionError, "--load-format runai_streamer"),
        ({"load_strategy": "eager"}, UnsupportedOptionError, "--safetensors-load-strategy eager"),
        ({"load_strategy": "prefetch"}, UnsupportedOptionError, "--safetensors-load-strategy prefetch"),
        ({"multithread_load": True}, UnsupportedOptionError, "enable_multithread_load"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    change: dict[str, Any], error: type[ExpertierError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        check_server(dataclasses.replace(GOOD, **change))
    assert caught.value.remedy


# ---- in vLLM


def refusals(moe: str, dense: str) -> dict[str, str]:
    """What starting an engine with each setting raises."""
    tries: dict[str, tuple[str, dict[str, Any]]] = {
        "dense": (dense, {}),
        "unknown key": (moe, {"expertier": {"budgt": "50%"}}),
        "expert parallel": (moe, {"enable_expert_parallel": True, "tensor_parallel_size": 2}),
        "lora": (moe, {"enable_lora": True}),
        "virtual workers": (moe, {"expertier": {"virtual_bias": 0.1}, "tensor_parallel_size": 2}),
        "speculative": (
            moe,
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        ),
        "dummy weights": (moe, {"load_format": "dummy"}),
        "offload": (moe, {"cpu_offload_gb": 1}),
        "worker": (moe, {"worker_cls": "some.where.Worker"}),
        "small budget": (moe, {"expertier": {"budget": 1000}}),
        "large budget": (moe, {"expertier": {"budget": "500%"}}),
    }

    def start(model: str, arguments: dict[str, Any]) -> None:
        with engine(model, "50%", **arguments):
            pass

    return {name: error_of(functools.partial(start, *arguments)) for name, arguments in tries.items()}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("vllm")
    moe = write_hf(tmp_path_factory.mktemp("moe"), SPEC)
    dense = write_hf(tmp_path_factory.mktemp("dense"), SPEC)
    config = json.loads((dense / "config.json").read_text())
    for key in [key for key in config if "expert" in key or "moe" in key]:
        del config[key]
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 64}
    (dense / "config.json").write_text(json.dumps(config))
    outcome: dict[str, str] = run(refusals, str(moe), str(dense))
    return outcome


@pytest.mark.engine
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("dense", "NotMoEError: "),
        ("unknown key", "UnsupportedOptionError: Expertier has no option 'budgt'. Did you mean 'budget'?"),
        ("expert parallel", "UnsupportedOptionError: --enable-expert-parallel is not supported"),
        ("lora", "UnsupportedOptionError: --enable-lora is not supported"),
        ("virtual workers", "UnsupportedOptionError: Virtual experts are not possible with --tensor-parallel-size 2"),
        ("speculative", "UnsupportedOptionError: Speculative decoding is not supported"),
        ("dummy weights", "UnsupportedOptionError: --load-format dummy"),
        ("offload", "UnsupportedOptionError: vLLM's own weight offloading is on"),
        ("worker", "UnsupportedOptionError: --worker-cls some.where.Worker is not vLLM's own"),
        ("small budget", "BudgetError: A budget of 1000 B cannot hold the experts one token needs in layer 0"),
        ("large budget", "BudgetError: The budget '500%' is more than all experts"),
    ],
)
def test_an_engine_that_cannot_be_does_not_start_and_says_why(
    refused: dict[str, str], case: str, expected: str
) -> None:
    assert refused[case].startswith(expected)


def with_foreign_plugin(model: str) -> dict[str, str]:
    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    class TheirExperts(RoutedExperts):  # type: ignore[misc]
        """What another plugin would register."""

    PluggableLayer.register_oot(TheirExperts, name="RoutedExperts")

    def start() -> None:
        with engine(model, "50%"):
            pass

    return {"error": error_of(start)}


@pytest.mark.engine
def test_a_second_plugin_that_replaced_the_experts_is_named(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    error = run(with_foreign_plugin, str(write_hf(tmp_path, SPEC)))["error"]
    assert error.startswith("UnsupportedEngineError: Another plugin has already replaced vLLM's RoutedExperts")
    assert "TheirExperts" in error


def unknown_version(model: str) -> dict[str, str]:
    import vllm

    vllm.__version__ = "0.99.1"

    def start(budget: str | None) -> Callable[[], None]:
        def call() -> None:
            with engine(model, budget):
                pass

        return call

    return {"ours": error_of(start("50%")), "stock": error_of(start(None))}


@pytest.mark.engine
def test_an_unknown_version_of_vllm_is_refused_and_stock_still_starts(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    outcome = run(unknown_version, str(write_hf(tmp_path, SPEC)))
    assert outcome["ours"].startswith("UnsupportedEngineError: This Expertier does not know vLLM 0.99.1.")
    assert outcome["stock"] == ""


def test_a_quantisation_that_was_never_run_with_expertier_is_refused_by_name() -> None:
    class MoEMethodOfTomorrow:
        def create_weights(self) -> None:
            raise AssertionError("nothing is created")

        process_weights_after_loading = create_weights

    stage = ExpertStage(object(), "model.layers.3.mlp.experts")
    with pytest.raises(UnsupportedModelError, match=r"MoEMethodOfTomorrow.*bf16"):
        stage.adopt(MoEMethodOfTomorrow())
