"""The one-expert stage of a layer, without an engine: on the layer's device, and with the kernels that are known."""

from __future__ import annotations

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
    with pytest.raises(UnsupportedModelError, match=rf"{kernel}, and where that looks.*on CUDA triton"):
        fill(kernel).rows(in_slots=True)


def test_a_kernel_that_computes_on_slots_is_not_given_windows() -> None:
    assert [row.param for row in fill("TritonExperts").rows(in_slots=True)] == ["w13_weight", "w2_weight"]
    with pytest.raises(UnsupportedModelError, match="TritonExperts"):
        fill("TritonExperts").rows()


def test_the_stage_is_where_the_layer_was_constructed() -> None:
    with torch.device("meta"):  # a device that every machine has; vLLM constructs models under theirs
        made = fill("TritonExperts")
    assert made.device.type == "meta" and made.experts == 8
    made.process_nothing()
    assert {value.device.type for value in made._module.parameters()} == {"meta"}
    assert {tuple(value.shape) for value in made._module.parameters()} == {(1, 64, 16), (1, 16, 32)}
