"""vLLM 0.32: gpt-oss, whose experts have a layer of their own and are stored fused. Imported only for such models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM, GptOssRoutedExperts

from expertier_vllm.experts import constructing

_EXPERTS: Final = ".mlp.experts."
_FUSED: Final = tuple(
    f"{_EXPERTS}{matrix}_proj{suffix}"
    for matrix in ("gate_up", "down")
    for suffix in ("", "_bias", "_blocks", "_scales")
)


def register(managed: Callable[[Any], Any]) -> None:
    """Replace gpt-oss's expert layer, and have its experts loaded one by one.

    Upstream: ``GptOssRoutedExperts`` is looked up by its own name. ``GptOssForCausalLM.load_weights`` copies a fused
    tensor of all experts into a parameter for all experts, past any ``weight_loader``; but it also takes tensors named
    ``...mlp.experts.<number>...`` one by one through it (``_try_load_streamed_expert``, made for a streaming loader).

    Parameters
    ----------
    managed : callable
        Makes the class that takes the place of an expert layer's.
    """
    if "GptOssRoutedExperts" not in op_registry_oot:
        PluggableLayer.register_oot(managed(GptOssRoutedExperts), name="GptOssRoutedExperts")
    stock = GptOssForCausalLM.load_weights
    if hasattr(stock, "expertier"):
        return

    @functools.wraps(stock)
    def load_weights(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = stock(self, weights if constructing.get() is None else _one_by_one(weights))
        return loaded

    load_weights.expertier = True  # type: ignore[attr-defined]
    GptOssForCausalLM.load_weights = load_weights


def _one_by_one(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield views of single experts instead of fused tensors; nothing of them is read."""
    for name, tensor in weights:
        if name.endswith(_FUSED):
            head, _, tail = name.partition(_EXPERTS)
            for expert, piece in enumerate(tensor.unbind()):
                # MXFP4 blocks are stored (rows, blocks, bytes), and in three dimensions an expert looks like a layer.
                yield f"{head}{_EXPERTS}{expert}.{tail}", piece.flatten(1) if piece.dim() > 2 else piece
        else:
            yield name, tensor
