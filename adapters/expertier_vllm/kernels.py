"""What a kernel of vLLM was built with: whether it sees what is put in the place of its layer's weights, and only that.

Upstream: a method hands its layer's parameters to a ``FusedMoEQuantConfig``, and that to the kernel it makes
(fused_moe/config.py, fused_moe/modular_kernel.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from expertier_vllm import refusals


def check_kernel(kernel: Any, parameters: Iterable[torch.nn.Parameter], *, in_slots: bool) -> None:
    """Refuse a kernel that holds other tensors than its layer's parameters.

    What comes and goes is put under these very objects. A copy, a view or something reckoned from them would stay as it
    was when there was one expert of zeros.

    Parameters
    ----------
    kernel : object or None
        What the layer's method made; nothing is known of methods that make none.
    parameters : iterable of Parameter
        The layer's.
    in_slots : bool
        Whether steps may be padded and divided otherwise than stock's, as they are on a device.

    Raises
    ------
    UnsupportedModelError
        It does, or in slots: what it makes of a token depends on the others of its call.
    """
    experts = getattr(kernel, "fused_experts", None)
    if experts is None:
        return
    name = type(experts).__name__
    known = {id(parameter) for parameter in parameters}
    own = sorted({where for where, tensor in _tensors(experts) if id(tensor) not in known})
    if own:
        raise refusals.own_tensors(name, own)
    if in_slots and _scales_by_call(experts.quant_config):
        raise refusals.scale_of_a_call(name)


def _tensors(experts: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a kernel keeps, and where: its own, and those of the four operands of its products."""
    holders = {"": experts}
    if experts.quant_config is not None:
        holders |= {f"{operand}.": getattr(experts.quant_config, operand) for operand in ("_a1", "_a2", "_w1", "_w2")}
    for prefix, holder in holders.items():
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value


def _scales_by_call(config: Any) -> bool:
    """Whether the kernel takes one scale of all inputs of a call.

    Upstream: ``a2_scale_is_global`` in ``TritonExperts.apply``.
    """
    if config is None or config.quant_dtype is None or config.a2_scale is not None:
        return False
    return config.block_shape is None and not config.per_act_token_quant
