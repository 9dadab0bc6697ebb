"""vLLM 0.32: a whole MoE layer as one operator, which CUDA graphs can be split at. Imported only in workers.

Where stock compiles for a device its opaque boundary is around routing and experts together
(``torch.ops.vllm.moe_forward``). So is ours, or the compiler would fuse, and round, differently. But stock's operators
return new tensors, and what is captured behind them could not find those again: ours fill tensors that the piece before
has allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

_LIBRARY: Final = torch.library.Library("expertier", "FRAGMENT")


def _moe(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    layer_name: LayerNameType,
    output: torch.Tensor,
) -> None:
    """Upstream: ``moe_runner._moe_forward``."""
    output.copy_(_computed(layer_name, hidden_states, router_logits, shared_experts_input, input_ids))


def _moe_shared(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    layer_name: LayerNameType,
    shared_output: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Upstream: ``moe_runner._moe_forward_shared``."""
    shared, routed = _computed(layer_name, hidden_states, router_logits, shared_experts_input, input_ids)
    shared_output.copy_(shared)
    output.copy_(routed)


def _computed(layer_name: Any, *arguments: torch.Tensor | None) -> Any:
    """Upstream: ``MoERunner._forward_impl``, for which the operators are a way around the compiler."""
    name = moe_runner._resolve_layer_name(layer_name)
    return moe_runner.get_layer_from_name(name)._forward_impl(*arguments)


def _nothing(*arguments: Any) -> None:
    """What the compiler is told: everything happens in the arguments."""


for _name, _function, _outputs in (("moe", _moe, ["output"]), ("moe_shared", _moe_shared, ["shared_output", "output"])):
    direct_register_custom_op(
        _name,
        _function,
        # Some of stock's kernels use their input as room for their output.
        mutates_args=["hidden_states", *_outputs],
        fake_impl=_nothing,
        target_lib=_LIBRARY,
        dispatch_key=current_platform.dispatch_key,
    )


def _into_one(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    layer_name: Any,
    hidden_dim_unpadded: int,
) -> torch.Tensor:
    given = hidden_states, router_logits, shared_experts_input, input_ids, layer_name
    output: torch.Tensor = moe_runner._moe_forward_fake(*given, hidden_dim_unpadded)
    torch.ops.expertier.moe(*given, output)
    return output


def _into_two(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    layer_name: Any,
    hidden_dim_unpadded: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    given = hidden_states, router_logits, shared_experts_input, input_ids, layer_name
    shared_output, output = moe_runner._moe_forward_shared_fake(*given, hidden_dim_unpadded)
    torch.ops.expertier.moe_shared(*given, shared_output, output)
    return shared_output, output


def install(model: torch.nn.Module) -> None:
    """Have all managed layers computed through the operators.

    Upstream: ``MoERunner._forward_entry``, chosen when the layer is constructed and called through ever after. What
    stock tells the compiler about its operators tells what shapes they return.
    """
    for runner in model.modules():
        if getattr(getattr(runner, "routed_experts", None), "managed", None) is None:
            continue
        entry: Callable[..., Any] = _into_one if runner._shared_experts is None else _into_two
        runner._forward_entry = entry
