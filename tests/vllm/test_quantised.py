"""Quantised experts: stock's tokens where vLLM's CPU build has a kernel, stock's bytes where it has none.

vLLM offers its quantised CPU kernels only on processors with AMX. They run on others with AVX-512 as well, so here the
question for AMX is answered with yes, for stock and for Expertier alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.tiny_hf import HfSpec, write_hf
from support.vllm_process import engine, error_of, run
from support.vllm_rows import sidecar_rows, stock_rows

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

COMPUTED = ("fp8", "int8", "int4", "gptq", "awq", "mxfp4")
SHARDED = ("int8", "gptq")  # their checkpoints are in several files
WIDE = {"layers": 2, "intermediate": 128, "experts": 8}


def spec_of(kind: str) -> HfSpec:
    if kind == "mxfp4":
        return HfSpec(family="gpt_oss", layers=2, experts=8)
    return HfSpec(experts_as=kind, files=3 if kind in SHARDED else 1, **WIDE)  # type: ignore[arg-type]


def answers(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 * row + 3 * place) % 250 for place in range(length)]}
        for row, length in enumerate((3, 40, 17))
    ]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]


def compare(models: dict[str, str]) -> dict[str, Any]:
    """Tokens and rows of stock and of Expertier at 40 %, and tokens with the sidecar of the first start."""
    import torch
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    if not hasattr(torch.ops._C, "fused_experts_cpu"):
        return {"absent": True}
    for kernel in ("CPUExpertsFp8", "CPUExpertsInt8", "CPUExpertsInt4", "CPUExpertsMxfp4"):
        getattr(cpu_moe, kernel)._supports_current_device = staticmethod(lambda: True)
    outcome: dict[str, Any] = {}
    for kind, model in models.items():
        with engine(model) as llm:
            outcome[kind] = {"stock": answers(llm), "stock rows": stock_rows(llm)}
        with engine(model, "40%") as llm:
            outcome[kind] |= {"ours": answers(llm), "rows": sidecar_rows(llm)}
            outcome[kind]["stats"] = llm.collective_rpc("expertier_stats")[0]
    with engine(models["awq"], "60%") as llm:
        outcome["again"] = answers(llm)
    outcome["small"] = error_of(lambda: engine(models["int8"], 20000).__enter__())
    return outcome


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("quantised")
    found = run(compare, {kind: str(write_hf(directory / kind, spec_of(kind))) for kind in COMPUTED})
    if "absent" in found:
        pytest.skip("vLLM has no quantised kernels for this processor")
    yield found
    shutil.rmtree(directory)


@pytest.mark.parametrize("kind", COMPUTED)
def test_quantised_experts_give_stocks_tokens(outcome: dict[str, Any], kind: str) -> None:
    assert outcome[kind]["ours"] == outcome[kind]["stock"]
    assert len({tuple(tokens) for tokens in outcome[kind]["stock"]}) == 3


@pytest.mark.parametrize("kind", COMPUTED)
def test_the_sidecar_holds_weights_scales_and_zero_points_as_stock_does(outcome: dict[str, Any], kind: str) -> None:
    assert len(outcome[kind]["rows"]) >= 2 * 8 * 4
    assert outcome[kind]["rows"] == outcome[kind]["stock rows"]


@pytest.mark.parametrize("kind", COMPUTED)
def test_what_belongs_to_quantised_experts_counts_in_the_budget(outcome: dict[str, Any], kind: str) -> None:
    stats = outcome[kind]["stats"]
    assert stats["peak_resident_bytes"] <= stats["budget_bytes"] == int(0.4 * stats["total_bytes"])
    assert stats["bytes_read"] > stats["total_bytes"]


def test_a_second_start_finds_the_quantised_experts_in_the_sidecar(outcome: dict[str, Any]) -> None:
    assert outcome["again"] == outcome["awq"]["stock"]


def test_a_budget_that_ends_with_the_scales_is_refused_with_what_is_needed(outcome: dict[str, Any]) -> None:
    assert outcome["small"].startswith("BudgetError: A budget of 19.53 KiB cannot hold ")
    assert "Give at least " in outcome["small"]


# ---- formats without a kernel in the CPU build


def bytes_alone(model: str) -> dict[str, Any]:
    """Rows of fp8 with a scale per matrix and per layer; the kernel is left out, and the quantiser is torch's."""
    import torch
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization import fp8
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    from expertier_vllm import row_fill

    def quantise(values: Any, scale: Any) -> tuple[Any, Any]:
        return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    fp8.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.TRITON, TritonExperts)
    fp8_utils.ops.scaled_fp8_quant = quantise
    fp8.Fp8MoEMethod.apply = lambda self, layer, x, *_, **__: torch.zeros_like(x)
    outcome = {"refused": error_of(lambda: engine(model, "100%").__enter__())}
    row_fill.KERNELS |= {"TritonExperts"}  # type: ignore[misc]
    with engine(model) as llm:
        outcome["stock"] = stock_rows(llm)
    for start in ("first", "second"):
        with engine(model, "100%") as llm:
            outcome[start] = sidecar_rows(llm)
            worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            layers = [module for module in worker.get_model().modules() if hasattr(module, "compute_resident")]
            outcome[f"{start} scales"] = [layer.w13_input_scale.item() for layer in layers]
    return outcome


def test_a_scale_that_is_the_largest_of_all_experts_is_gathered_from_all(tmp_path: Path) -> None:
    outcome = run(bytes_alone, str(write_hf(tmp_path, HfSpec(experts_as="fp8_static", **WIDE))))  # type: ignore[arg-type]
    assert outcome["first"] == outcome["second"] == outcome["stock"]
    assert len({name.partition(" ")[0] for name in outcome["stock"]}) == 2 * 6
    assert outcome["first scales"] == outcome["second scales"]
    assert all(scale > 0 for scale in outcome["first scales"])
    assert outcome["refused"].startswith("UnsupportedModelError: vLLM computes these experts with TritonExperts")
