"""The one-expert stage of a layer, without an engine: on the layer's device, and with the kernels that are known."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from expertier.errors import UnsupportedModelError, UnsupportedOptionError

torch = pytest.importorskip("torch")


class Layer(torch.nn.Module):
    """Has what vLLM's expert layer has, as far as it is looked at."""

    local_num_experts = 8


class UnquantizedFusedMoEMethod:
    """Looks like vLLM's method, and computes with a kernel of any name."""

    is_monolithic = False
    moe_kernel = None

    def __init__(self, kernel: str) -> None:
        self.experts_cls = type(kernel, (), {})

    def create_weights(self, layer: Layer, num_experts: int) -> None:
        for name, shape in (("w13_weight", (64, 16)), ("w2_weight", (16, 32))):
            values = torch.empty(num_experts, *shape, dtype=torch.bfloat16)
            layer.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Leave everything as it is."""


def fill(kernel: str, **attributes: Any) -> Any:
    """A stage for one of eight experts."""
    from expertier_vllm.row_fill import RowFill

    layer, method = Layer(), UnquantizedFusedMoEMethod(kernel)
    for name, value in attributes.items():
        setattr(method, name, value)
    made = RowFill(layer, method, lambda: None)
    method.create_weights(layer=layer, num_experts=8)
    return made


def test_a_kernel_that_routes_inside_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"UnquantizedFusedMoEMethod is monolithic.*--moe-backend"):
        fill("TrtLlmBf16ExpertsMonolithic", is_monolithic=True).rows(in_slots=True)


@pytest.mark.parametrize("kernel", ["FlashInferExperts", "BatchedTritonExperts", "MoonEPExperts"])
def test_a_device_kernel_that_nobody_read_is_refused_with_the_one_that_is_known(kernel: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"{kernel}, and where that looks.*On CUDA use --moe-backend triton"
    ):
        fill(kernel).rows(in_slots=True)


def test_a_kernel_that_computes_on_slots_is_not_given_windows() -> None:
    assert [row.param for row in fill("TritonExperts").rows(in_slots=True)] == ["w13_weight", "w2_weight"]
    with pytest.raises(UnsupportedModelError, match="TritonExperts"):
        fill("TritonExperts").rows()


def test_a_kernel_that_rounds_by_slot_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match=r"MarlinExperts, and that divides its sums.*would round by slot"):
        fill("MarlinExperts").rows(in_slots=True)


def test_a_format_without_a_known_kernel_on_a_device_is_refused_with_one_that_has() -> None:
    from expertier_vllm.formats import FORMATS

    made = fill("MarlinExperts")
    made.format = FORMATS["AutoAWQMoEMethod"]
    with pytest.raises(UnsupportedModelError, match=r"On CUDA use int4 of GPTQ or compressed-tensors"):
        made.rows(in_slots=True)


class Kernel:
    """Looks like what a method of vLLM makes, given the configuration of its products."""

    def __init__(self, config: Any) -> None:
        self.fused_experts = SimpleNamespace(quant_config=config)


def test_a_kernel_that_keeps_a_copy_of_the_scales_is_refused_by_name() -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a16_moe_quant_config

    from expertier_vllm.kernels import check_kernel

    first, second = (torch.nn.Parameter(torch.ones(1, 2, 2), requires_grad=False) for _ in range(2))
    kernel = Kernel(fp8_w8a16_moe_quant_config(w1_scale=first, w2_scale=second, block_shape=[128, 128]))
    check_kernel(kernel, [first, second], in_slots=True)
    kernel.fused_experts._transposed = first.data.transpose(1, 2).contiguous()
    with pytest.raises(UnsupportedModelError, match=r"copies of its own \(_transposed\)"):
        check_kernel(kernel, [first, second], in_slots=False)
    copied = Kernel(fp8_w8a16_moe_quant_config(w1_scale=first, w2_scale=second.data, block_shape=[128, 128]))
    with pytest.raises(UnsupportedModelError, match=r"copies of its own \(_w2.scale\)"):
        check_kernel(copied, [first, second], in_slots=False)


@pytest.mark.parametrize(
    ("scheme", "refused"),
    [({"block_shape": [128, 128]}, False), ({"per_act_token_quant": True}, False), ({}, True)],
    ids=["by block", "by token", "by call"],
)
def test_one_scale_for_all_inputs_of_a_call_is_refused_in_slots(scheme: dict[str, Any], refused: bool) -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    from expertier_vllm.kernels import check_kernel

    scales = [torch.nn.Parameter(torch.ones(1), requires_grad=False) for _ in range(4)]
    kernel = Kernel(fp8_w8a8_moe_quant_config(w1_scale=scales[0], w2_scale=scales[1], **scheme))
    static = Kernel(
        fp8_w8a8_moe_quant_config(w1_scale=scales[0], w2_scale=scales[1], a1_scale=scales[2], a2_scale=scales[3])
    )
    check_kernel(static, scales, in_slots=True)
    check_kernel(kernel, scales, in_slots=False)
    with pytest.raises(UnsupportedModelError, match="share one scale") if refused else contextlib.nullcontext():
        check_kernel(kernel, scales, in_slots=True)


def test_the_stage_is_where_the_layer_was_constructed() -> None:
    with torch.device("meta"):  # a device that every machine has; vLLM constructs models under theirs
        made = fill("TritonExperts")
    assert made.device.type == "meta" and made.experts == 8
    made.process_nothing()
    assert {value.device.type for value in made._module.parameters()} == {"meta"}
    assert {tuple(value.shape) for value in made._module.parameters()} == {(1, 64, 16), (1, 16, 32)}
