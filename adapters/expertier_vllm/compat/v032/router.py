"""vLLM 0.32: routers whose choice may prefer resident experts. Imported only where virtual experts were asked for."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from expertier.virtual import VirtualSettings, close_groups
from expertier_vllm import refusals
from expertier_vllm.stage import ExpertStage

_LIBRARY: Final = torch.library.Library("expertier", "FRAGMENT")


def _choose(
    router_logits: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream: as ``_experts`` in worker.py. What an operator returns must not be what it was given."""
    runner = get_forward_context().no_compile_layers[layer_name]
    weights, ids = runner.routed_experts.managed.choose(router_logits, topk_weights, topk_ids)
    return (
        weights.clone() if weights is topk_weights else weights,
        ids.clone() if ids is topk_ids else ids,
    )


def _choose_fake(
    router_logits: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(topk_weights), torch.empty_like(topk_ids)


# Residency changes from step to step, so a graph that torch.compile traces must not look into the choice.
direct_register_custom_op(
    "choose", _choose, fake_impl=_choose_fake, target_lib=_LIBRARY, dispatch_key=current_platform.dispatch_key
)


class VirtualRouter(CPURouter):  # type: ignore[misc]
    """vLLM's router, whose choice goes past Expertier before anybody computes with it.

    Upstream: ``BaseRouter._select_experts`` calls ``_compute_routing``; on the CPU all schemes are ``CPURouter``'s.
    """

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = super()._compute_routing(hidden_states, router_logits, indices_type, input_ids=input_ids)
        if torch.compiler.is_compiling():
            chosen: tuple[torch.Tensor, torch.Tensor] = torch.ops.expertier.choose(
                router_logits, weights, ids, self.expertier_layer
            )
            return chosen
        stage: ExpertStage = self.expertier_stage
        return stage.choose(router_logits, weights, ids)


class Scoring:
    """A router's arithmetic, for ids it did not choose itself; fulfils :class:`expertier_vllm.stand_ins.RouterScoring`.

    Upstream: ``cpu_router._softmax_topk`` and ``cpu_router._grouped_topk``.

    Parameters
    ----------
    router : CPURouter
        Whose settings hold.
    """

    def __init__(self, router: CPURouter) -> None:
        self._router = router

    def scores(self, logits: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What experts are ranked by, ``-inf`` in closed groups, and their gate weights before renormalisation."""
        router = self._router
        given: NDArray[np.float32] = logits.float().numpy()
        # Not torch's, which wakes all threads for sixteen rows of a softmax.
        if router.scoring_func == "sigmoid":
            plain = 0.5 + 0.5 * np.tanh(0.5 * given)  # cannot overflow
        else:
            plain = np.exp(given - given.max(axis=1, keepdims=True))
            plain /= plain.sum(axis=1, keepdims=True)
        if not router.use_grouped_topk:
            return plain, plain
        correction = router.e_score_correction_bias
        ranking = close_groups(
            plain if correction is None else plain + correction.float().numpy(),
            groups=router.num_expert_group,
            kept=router.topk_group,
            rank_by="max" if correction is None else "top2",
        )
        return ranking, plain

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        return logits.sigmoid() if self._router.scoring_func == "sigmoid" else torch.softmax(logits, dim=-1)

    def weights(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The router's own weights of any experts, float32, shape of `ids`."""
        router = self._router
        picked = ids.to(torch.int64)
        if router.use_grouped_topk:
            weights = self._scores(logits).gather(1, picked)
            if router.renormalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            return weights if router.routed_scaling_factor == 1.0 else weights * router.routed_scaling_factor
        values = logits.gather(1, picked)
        if router.renormalize:
            return torch.softmax(values, dim=-1).to(torch.float32)
        return (values - torch.logsumexp(logits, dim=-1, keepdim=True)).exp().to(torch.float32)


def install(model: torch.nn.Module, settings: VirtualSettings) -> None:
    """Have the routers of all managed layers ask Expertier.

    Parameters
    ----------
    model : Module
        The model.
    settings : VirtualSettings
        What was asked for.

    Raises
    ------
    UnsupportedModelError
        A router's weights cannot be had for experts that it did not choose itself.
    UnsupportedOptionError
        As for :meth:`expertier.virtual.VirtualSettings.check_groups`.
    """
    for runner in model.modules():
        stage = getattr(getattr(runner, "routed_experts", None), "managed", None)
        if stage is None:
            continue
        router: Any = runner.router
        reason = _unknown(router)
        if reason:
            raise refusals.unknown_router(reason)
        settings.check_groups(router.num_expert_group if router.use_grouped_topk else 0)
        router.__class__ = VirtualRouter
        router.expertier_layer = runner.routed_experts.layer_name
        router.expertier_stage = stage
        stage.scoring = Scoring(router)


def _unknown(router: Any) -> str:
    """Name of what a router does that nobody has verified; empty for the known ones."""
    if type(router) not in (CPURouter, VirtualRouter):
        return type(router).__name__
    if router.custom_routing_function is not None:
        function = router.custom_routing_function
        return f"custom routing by {getattr(function, '__qualname__', type(function).__name__)}"
    if router.scoring_func not in ("softmax", "sigmoid"):
        return f"scoring by {router.scoring_func}"
    if router._hash_indices_table is not None:
        return "routing by token ids"
    return ""
