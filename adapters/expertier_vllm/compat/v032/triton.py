"""vLLM 0.32: the Triton kernels on slots divide their work, and so round, as they would on all experts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import override_config
from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_wna16_block_config, try_get_optimal_moe_config

from expertier_vllm.formats import SLOT_KERNELS
from expertier_vllm.stage import ExpertStage


def install(model: torch.nn.Module) -> None:
    """Have every managed layer's kernel choose its tiles for the experts that the layer has, not for its slots.

    And for the tokens of a whole step, also where it is given a step in groups. Upstream: ``apply`` of both kernels
    asks ``try_get_optimal_moe_config``, which looks tiles up by the number of experts that the weights have and by that
    of tokens, or reckons with them. Tiles decide in which order a row's products are added.
    """
    for module in model.modules():
        stage = getattr(module, "managed", None)
        if stage is None:
            continue
        kernel = module.quant_method.moe_kernel.fused_experts
        if type(kernel).__name__ in SLOT_KERNELS:
            _tile_for(kernel, stage)


def _tile_for(kernel: Any, stage: ExpertStage) -> None:
    stock, experts = kernel.apply, stage.experts

    def apply(*, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, **named: Any) -> Any:
        tokens = stage.tokens or len(hidden_states)
        tiles = try_get_optimal_moe_config(
            (experts, *w1.shape[1:]),
            (experts, *w2.shape[1:]),
            named["topk_ids"].shape[1],
            kernel.quant_config.config_name(hidden_states.dtype),
            tokens,
            block_shape=kernel.block_shape,
        )
        if type(kernel).__name__ == "TritonWNA16Experts" and stage.tokens:
            tiles = tiles | _int_tiles(tiles, tokens)
        with override_config(tiles):
            return stock(hidden_states=hidden_states, w1=w1, w2=w2, **named)

    kernel.apply = apply


def _int_tiles(tiles: dict[str, int], tokens: int) -> dict[str, int]:
    """What ``invoke_fused_moe_wna16_triton_kernel`` adds: it asks once more, and what it asks by is one token or more.

    A step that comes in groups has more than one.
    """
    block: dict[str, int] = get_moe_wna16_block_config(
        config=tiles,
        use_moe_wna16_cuda=False,
        num_valid_tokens=tokens,
        size_k=0,
        size_n=0,
        num_experts=0,
        group_size=0,
        real_top_k=1,
        block_size_m=0,
    )
    return block
