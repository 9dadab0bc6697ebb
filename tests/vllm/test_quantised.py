"""Quantised experts: stock's tokens and bytes, in windows and in slots, where vLLM's CPU build has a kernel and, with
torch in the kernel's place, where only a device has one.

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
from support.vllm_rows import sidecar_rows, slot_rows, stock_rows

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

COMPUTED = ("fp8", "int8", "int4", "gptq", "awq", "mxfp4")
ON_DEVICE = ("fp8", "fp8_static", "gptq")  # in blocks; by matrix, with one scale of inputs; groups and zero points
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


def sidecars_of(model: str) -> dict[str, int]:
    """Sidecars beside a checkpoint, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(model).glob("*.expertier")}


def in_slots(model: str) -> dict[str, Any]:
    """Tokens, rows and counters with all experts in slots, and with half in the same slots."""
    found = {}
    with engine(model, "100%", expertier={"host_budget": "16MiB"}) as llm:
        for budget in ("100%", "55%"):
            stats = llm.collective_rpc("expertier_resize", args=(budget,))[0]
            found[budget] = {"tokens": answers(llm), "rows": slot_rows(llm)}
            found[budget]["stats"] = stats | llm.collective_rpc("expertier_stats")[0]
    return found


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
        sidecars = sidecars_of(model)
        outcome[kind] |= in_slots(model) | {"sidecars": [sidecars, sidecars_of(model)]}
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


@pytest.mark.parametrize("kind", COMPUTED)
def test_quantised_experts_in_slots_give_stocks_tokens_from_stocks_bytes(outcome: dict[str, Any], kind: str) -> None:
    check_slots(outcome[kind])


def check_slots(found: dict[str, Any]) -> None:
    stock, all_rows = found["stock rows"], found["100%"]["rows"]
    half, half_stats = found["55%"]["rows"], found["55%"]["stats"]
    assert found["100%"]["tokens"] == found["55%"]["tokens"] == found["stock"]
    assert all_rows == stock
    assert half == {name: stock[name] for name in half} and len(half) <= len(stock) * 5 // 8
    assert half_stats["resident_bytes"] <= half_stats["budget_bytes"] <= half_stats["total_bytes"] * 5 // 8
    assert half_stats["tier"]["host_loads"] > 0
    assert half_stats["peak_resident_bytes"] <= half_stats["total_bytes"]


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_second_start_finds_the_quantised_experts_in_the_sidecar(outcome: dict[str, Any], kind: str) -> None:
    before, after = outcome[kind]["sidecars"]
    assert len(before) == 1 and after == before


def test_a_budget_that_ends_with_the_scales_is_refused_with_what_is_needed(outcome: dict[str, Any]) -> None:
    assert outcome["small"].startswith("BudgetError: A budget of 19.53 KiB cannot hold ")
    assert "Give at least " in outcome["small"]


# ---- the kernels of a device


def with_kernels_of_a_device(models: dict[str, str]) -> dict[str, Any]:
    """Stock and experts in slots, with torch in the place of Triton; and slots again, with the sidecar of the first."""
    from support import torch_experts

    torch_experts.install()
    outcome = {}
    for kind, model in models.items():
        with engine(model) as llm:
            outcome[kind] = {"stock": answers(llm), "stock rows": stock_rows(llm)}
        outcome[kind] |= in_slots(model)
    model = models["fp8_static"]
    outcome["windows"] = error_of(lambda: engine(model, "100%").__enter__())
    with engine(model, "100%", expertier={"host_budget": "16MiB"}) as llm:
        outcome["second"] = slot_rows(llm)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        layers = [module for module in worker.get_model().modules() if hasattr(module, "compute_resident")]
        outcome["scales"] = [(layer.w13_input_scale.item(), layer.w13_input_scale.dim()) for layer in layers]
    return outcome


@pytest.fixture(scope="module")
def on_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("device")
    found = run(with_kernels_of_a_device, {kind: str(write_hf(directory / kind, spec_of(kind))) for kind in ON_DEVICE})
    shutil.rmtree(directory)
    return dict(found)


@pytest.mark.parametrize("kind", ON_DEVICE)
def test_the_kernels_of_a_device_find_scales_and_zero_points_where_the_expert_is(
    on_device: dict[str, Any], kind: str
) -> None:
    check_slots(on_device[kind])
    assert len({tuple(tokens) for tokens in on_device[kind]["stock"]}) == 3


def test_a_scale_that_is_the_largest_of_all_experts_is_gathered_from_all(on_device: dict[str, Any]) -> None:
    stock = on_device["fp8_static"]["stock rows"]
    assert on_device["second"] == stock
    assert len({name.partition(" ")[0] for name in stock}) == 2 * 6
    assert all(scale > 0 and dimensions == 0 for scale, dimensions in on_device["scales"])


def test_the_kernels_of_a_device_are_not_given_windows(on_device: dict[str, Any]) -> None:
    assert on_device["windows"].startswith("UnsupportedModelError: vLLM computes these experts with TritonExperts")
