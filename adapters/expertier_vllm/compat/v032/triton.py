"""vLLM 0.32: the Triton kernel on slots divides its work, and so rounds, as it would on all experts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import override_config
from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

from expertier_vllm.formats import SLOT_KERNELS


def install(model: torch.nn.Module) -> None:
    """Have every managed layer's kernel choose its tiles for as many experts as the layer has, not as it has slots.

    Upstream: ``TritonExperts.apply`` asks ``try_get_optimal_moe_config``, which looks tiles up by the number of experts
    that the weights have, or reckons with it. Tiles decide in which order a row's products are added.
    """
    for module in model.modules():
        stage = getattr(module, "managed", None)
        if stage is None:
            continue
        kernel = module.quant_method.moe_kernel.fused_experts
        if type(kernel).__name__ in SLOT_KERNELS:
            _tile_for(kernel, stage.experts)


def _tile_for(kernel: Any, experts: int) -> None:
    stock = kernel.apply

    def apply(*, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, **named: Any) -> Any:
        tiles = try_get_optimal_moe_config(
            (experts, *w1.shape[1:]),
            (experts, *w2.shape[1:]),
            named["topk_ids"].shape[1],
            kernel.quant_config.config_name(hidden_states.dtype),
            len(hidden_states),
            block_shape=kernel.block_shape,
        )
        with override_config(tiles):
            return stock(hidden_states=hidden_states, w1=w1, w2=w2, **named)

    kernel.apply = apply
