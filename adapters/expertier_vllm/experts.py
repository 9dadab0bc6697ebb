"""The out-of-tree expert layer: stock's class with the experts' weights in windows instead of in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import torch

from expertier_vllm.stage import ExpertStage

if TYPE_CHECKING:
    from expertier_vllm.layers import LoadingLayers

constructing: Final[ContextVar[LoadingLayers | None]] = ContextVar("expertier_constructing", default=None)
"""The layers of the model that is being built; ``None`` builds stock layers."""

Opaque = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str], torch.Tensor]


def managed_class(base: Any, opaque: Opaque) -> Any:
    """Make the class that takes the place of one of vLLM's expert layers.

    Parameters
    ----------
    base : type
        The class to replace; ``vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts`` or a subclass.
    opaque : callable
        The custom operator around the experts, for graphs that torch.compile traces. Called with the hidden states,
        the weights and ids of the chosen experts, and the name of the layer.

    Returns
    -------
    type
        A subclass of `base`. Where nothing is set in :data:`constructing` it behaves like `base`.
    """

    class ManagedExperts(base):  # type: ignore[misc]
        """An expert layer whose experts come and go."""

        def __init__(self, layer_name: str, *args: Any, **kwargs: Any) -> None:
            layers = constructing.get()
            # nn.Module accepts attributes only after its own __init__, which stock's calls first.
            self.__dict__["managed"] = stage = None if layers is None else ExpertStage(self, layer_name)
            super().__init__(layer_name, *args, **kwargs)
            if layers is not None and stage is not None:
                layers.add(stage)

        def _get_quant_method(self, *args: Any, **kwargs: Any) -> Any:
            method = super()._get_quant_method(*args, **kwargs)
            if self.managed is not None:
                self.managed.adopt(method)
            return method

        def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
            if self.managed is not None and self.managed.filling:
                return 0  # the only one the stage has room for
            local: int = super()._map_global_expert_id_to_local_expert_id(expert_id)
            return local

        def weight_loader(
            self,
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            stage = self.managed
            if stage is None or stage.filling:
                loaded: bool | None = super().weight_loader(
                    param, loaded_weight, weight_name, shard_id, expert_id, return_success
                )
                return loaded
            local = self._map_global_expert_id_to_local_expert_id(expert_id)
            if local >= 0:
                stage.remember(param, loaded_weight, weight_name, shard_id, local)
            return local >= 0 if return_success else None

        # What some of vLLM's models look for before they pass `return_success` (models/llama4.py).
        weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

        def forward_modular(
            self,
            x: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            shared_experts: Any = None,
            shared_experts_input: torch.Tensor | None = None,
        ) -> Any:
            if self.managed is None:
                return super().forward_modular(x, topk_weights, topk_ids, shared_experts, shared_experts_input)
            if torch.compiler.is_compiling():
                return opaque(x, topk_weights, topk_ids, self.layer_name)
            return self.managed.run(x, topk_weights, topk_ids)

        def compute_resident(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
            """Run stock's kernel; every expert in `topk_ids` must be resident."""
            spacing = self.managed.spacing
            numbers = topk_ids if spacing == 1 else topk_ids * spacing
            output: torch.Tensor = super().forward_modular(x, topk_weights, numbers)
            return output

    ManagedExperts.__name__ = ManagedExperts.__qualname__ = f"Managed{base.__name__}"
    return ManagedExperts
