"""How experts may be quantised: what is known of vLLM's methods and kernels, by the names that they have there.

A method creates a layer's weights and rearranges them once they are loaded; a kernel computes on the result. Both are
upstream's choice. Knows names, not vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class ExpertFormat:
    """What a quantisation method makes of an expert.

    Attributes
    ----------
    name : str
        In words.
    over_experts : frozenset of str
        Parameters that the method replaces by their largest value among a layer's experts.
    on_device : str
        How to get a kernel that computes on slots, on a device.
    """

    name: str
    over_experts: frozenset[str] = frozenset()
    on_device: str = "use --moe-backend triton"


_OTHER_INT4: Final = "use int4 of GPTQ or compressed-tensors with --moe-backend triton"
_INPUT_SCALES: Final = frozenset({"w13_input_scale", "w2_input_scale"})

FORMATS: Final[Mapping[str, ExpertFormat]] = {
    "UnquantizedFusedMoEMethod": ExpertFormat(name="unquantised"),
    "Fp8MoEMethod": ExpertFormat(name="fp8", over_experts=_INPUT_SCALES),
    "CompressedTensorsW8A8Fp8MoEMethod": ExpertFormat(name="fp8 (compressed-tensors)", over_experts=_INPUT_SCALES),
    "CompressedTensorsW8A8Int8MoEMethod": ExpertFormat(name="int8 (compressed-tensors)"),
    "CompressedTensorsWNA16MoEMethod": ExpertFormat(name="int4 (compressed-tensors)"),
    "AutoGPTQMoEMethod": ExpertFormat(name="int4 (GPTQ)"),
    "AutoAWQMoEMethod": ExpertFormat(name="int4 (AWQ)", on_device=_OTHER_INT4),
    "GptOssMxfp4MoEMethod": ExpertFormat(name="MXFP4", on_device="use a checkpoint in bf16"),
}
"""By class: methods of which every expert's row was compared with what stock makes of the whole layer."""

KERNELS: Final = frozenset(
    {
        "CPUUnquantizedExperts",
        "X86CPUUnquantizedExperts",
        "ArmCPUUnquantizedExperts",
        "PowerCPUUnquantizedExperts",
        "CPUExpertsFp8",
        "CPUExpertsInt8",
        "CPUExpertsInt4",
        "CPUExpertsMxfp4",
    }
)
"""Kernels that find the expert with number ``n`` at ``n`` times its size, and touch none that has no tokens.

Upstream: fused_moe/experts/cpu_moe.py. Others there keep scales of their own, made when the layer is loaded, or route
inside.
"""

SLOT_KERNELS: Final = frozenset({"TritonExperts", "TritonWNA16Experts"})
"""Kernels that compute on as many experts as their weights have, and so on slots.

Upstream: fused_moe/experts/triton_moe.py; ``fused_moe_kernel`` and ``fused_moe_kernel_gptq_awq`` in fused_moe.py find
weights, scales, zero points and biases of the expert with number ``n`` at ``n`` strides, and a row of the output is one
program's sum in one order. How they divide their work depends on the number of experts and of tokens, and their
rounding with it: see :mod:`expertier_vllm.compat.v032.triton`. Those of the processor are among the others.
"""
