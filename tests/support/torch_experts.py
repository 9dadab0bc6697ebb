"""What vLLM's Triton kernels compute, in torch: experts by number, with the tensors that those kernels would read."""

from __future__ import annotations

from typing import Any

import torch

from support.quantised import BLOCK


def install() -> None:
    """Let the kernels of a device compute where there is none, and every format that they know choose them."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts, TritonWNA16Experts
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization import auto_gptq, fp8
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8,
        compressed_tensors_moe_wna16,
    )
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    fp8.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.TRITON, TritonExperts)
    compressed_tensors_moe_w8a8_int8.select_int8_moe_backend = lambda **_: (Int8MoeBackend.TRITON, TritonExperts)
    for module in (auto_gptq, compressed_tensors_moe_wna16):
        module.select_wna16_moe_backend = lambda *_, **__: (WNA16MoEBackend.TRITON, TritonWNA16Experts)
    fp8_utils.ops.scaled_fp8_quant = _to_fp8
    for kernel in (TritonExperts, TritonWNA16Experts):
        kernel.expects_unquantized_inputs = property(lambda _: True)
        kernel.apply = _apply


def _to_fp8(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _apply(
    kernel: Any,
    *,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    **_: Any,
) -> None:
    config, total = kernel.quant_config, torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        up = _plain(config, w1, config.w1_scale, config.w1_zp, expert)
        down = _plain(config, w2, config.w2_scale, config.w2_zp, expert)
        gate, value = (hidden_states[tokens].float() @ up.T).chunk(2, dim=1)
        result = (torch.nn.functional.silu(gate) * value) @ down.T
        total[tokens] += (
            topk_weights[tokens, places, None] * result * (1 if config.a2_scale is None else config.a2_scale)
        )
    output.copy_(total)


def _plain(
    config: Any, weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, expert: int
) -> torch.Tensor:
    """One expert's matrix as it is meant."""
    matrix, scale = weights[expert], scales[expert].float()
    if config.use_int4_w4a16:
        numbers = torch.stack((matrix & 15, matrix >> 4), dim=-1).flatten(1).float()
        zero = 8.0
        if zeros is not None:
            by_row = torch.stack((zeros[expert] & 15, zeros[expert] >> 4), dim=1).flatten(0, 1).float()
            zero = by_row.repeat_interleave(numbers.shape[1] // by_row.shape[1], dim=1)
        return (numbers - zero) * scale.repeat_interleave(numbers.shape[1] // scale.shape[1], dim=1)
    if config.block_shape is not None:
        scale = scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
        scale = scale[: matrix.shape[0], : matrix.shape[1]]
    return matrix.float() * scale
