"""vLLM 0.32: what a worker does to manage experts, wherever it computes. Imported only in workers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from vllm import __version__
from vllm.distributed import get_world_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader import default_loader
from vllm.model_executor.model_loader.weight_utils import _natural_sort_key
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.outputs import ModelRunnerOutput

from expertier.catalog.safetensors_header import CONFIG_NAME
from expertier.errors import ExpertierError, ExpertLoadError, RouterScoresError, UnsupportedOptionError
from expertier.scheduling import CONTROL
from expertier_vllm import refusals
from expertier_vllm.board import Board, Reporter
from expertier_vllm.checkpoint import CheckpointFiles
from expertier_vllm.compat.v032 import REGROUPING, SCHEDULER
from expertier_vllm.compat.v032.failures import FailureExchange
from expertier_vllm.compat.v032.graphs import OPERATORS
from expertier_vllm.compat.v032.scheduler import PROBLEM, ROUTES, wants_exactness
from expertier_vllm.compat.v032.tokens import announce_tokens, exact_tokens
from expertier_vllm.experts import constructing, managed_class
from expertier_vllm.layers import WorkerFacts
from expertier_vllm.options import VllmOptions
from expertier_vllm.runtime import Runtime
from expertier_vllm.step_kind import StepKind
from expertier_vllm.worker_budget import MEETINGS

logger = logging.getLogger("vllm.expertier")

# ---- the expert layer

_LIBRARY: Final = torch.library.Library("expertier", "FRAGMENT")


def _experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    """Upstream: ``moe_runner.get_layer_from_name``, which finds layers for stock's own opaque operators."""
    runner = get_forward_context().no_compile_layers[layer_name]
    output: torch.Tensor = runner.routed_experts.managed.run(x, topk_weights, topk_ids)
    return output


def _experts_fake(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)


# Where stock on the CPU has its opaque boundary: around the experts only. A wider one changes what Inductor fuses, and
# with it the rounding (moe_runner.MoERunner._select_forward: Dynamo traces through everything else).
direct_register_custom_op(
    "experts", _experts, fake_impl=_experts_fake, target_lib=_LIBRARY, dispatch_key=current_platform.dispatch_key
)


def _register_experts(architectures: list[str]) -> None:
    """Replace vLLM's expert layer by ours; upstream: ``PluggableLayer.register_oot``, looked up by class name."""
    owner = op_registry_oot.get("RoutedExperts")
    if owner is None:
        PluggableLayer.register_oot(_managed(RoutedExperts), name="RoutedExperts")
    elif not hasattr(owner, "compute_resident"):
        raise refusals.foreign_experts(f"{owner.__module__}.{owner.__qualname__}")
    if "GptOssForCausalLM" in architectures:
        from expertier_vllm.compat.v032 import gpt_oss

        gpt_oss.register(_managed)


def _managed(base: Any) -> Any:
    return managed_class(base, torch.ops.expertier.experts)


def _step_kind() -> StepKind:
    """Upstream: ``ForwardContext.attn_metadata``, by layer; profiling and warm-up runs have none.

    Tokens beyond ``num_actual_tokens`` are padding, up to a size of which there is a captured graph.
    """
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict) or not metadata:
        return StepKind(real=False, decode=False)
    first = next(iter(metadata.values()))
    return StepKind(
        real=True,
        decode=getattr(first, "max_query_len", 0) == 1,
        tokens=getattr(first, "num_actual_tokens", None),
    )


# ---- the worker


class ManagedWorker:
    """A worker of vLLM with a bounded set of experts; to be mixed in before vLLM's class."""

    expertier: Runtime
    _budget_before: int | None = None  # the last change of it
    vllm_config: Any
    model_runner: Any
    cache_config: Any
    rank: int
    device: torch.device
    get_model: Callable[[], torch.nn.Module]

    def load_model(self, **arguments: Any) -> None:
        options = VllmOptions.from_additional_config(self.vllm_config.additional_config)
        assert options is not None
        _register_experts(self.vllm_config.model_config.architectures)
        self.expertier = Runtime(options, self._facts(), self._step_kind)
        self._failures = FailureExchange()
        token = constructing.set(self.expertier.layers)
        try:
            with _own_iterator(self.expertier.layers.files):
                super().load_model(**arguments)  # type: ignore[misc]
        finally:
            constructing.reset(token)
        self._check_all_managed()
        if OPERATORS[0] in (self.vllm_config.compilation_config.splitting_ops or ()):
            from expertier_vllm.compat.v032 import opaque

            opaque.install(self.get_model())
        self.expertier.finish_loading(_norms(self.get_model()))
        announce_tokens(self.model_runner, self.expertier.forward.announce)
        if self.vllm_config.scheduler_config.scheduler_cls == REGROUPING and options.scheduler != CONTROL:
            self.expertier.log_routes()
        if self.expertier.virtual is not None:
            from expertier_vllm.compat.v032 import router

            router.install(self.get_model(), self.expertier.virtual.settings)

    def _step_kind(self) -> StepKind:
        """Also tell which tokens are of requests that asked for exactness, and which are of prompts."""
        kind = _step_kind()
        if not kind.real or self.expertier.virtual is None:
            return kind
        requests = self.model_runner.requests
        asked, prompt = exact_tokens(
            self.model_runner, lambda request: wants_exactness(requests[request].sampling_params)
        )
        return replace(kind, asked=asked, prompt=prompt)

    def _facts(self) -> WorkerFacts:
        parallel = self.vllm_config.parallel_config
        size = parallel.tensor_parallel_size
        return WorkerFacts(
            checkpoint=_checkpoint(self.vllm_config.model_config, self.vllm_config.load_config),
            rank=self.rank,
            in_step=parallel.world_size > 1,
            local_workers=parallel.local_world_size,
            shard=f"tp {self.rank % size} of {size}",
            library=f"vllm {__version__}",
            device=self.device.type,
        )

    def _check_all_managed(self) -> None:
        kinds: dict[str, int] = {}
        for module in self.get_model().modules():
            if isinstance(module, RoutedExperts) and getattr(module, "managed", None) is None:
                kinds[type(module).__name__] = kinds.get(type(module).__name__, 0) + 1
        for kind, layers in kinds.items():
            raise refusals.unmanaged_experts(kind, layers)

    @contextlib.contextmanager
    def _before_serving(self) -> Iterator[None]:
        """For what is done before :meth:`_serve`: the others do not wait for a worker that fails there."""
        try:
            yield
        except BaseException:
            for _ in range(MEETINGS):
                get_world_group().barrier()
            raise

    def _serve(self, promised: int) -> None:
        """Take the final budget, now that everything else has its memory, and tell others how it goes.

        Upstream: ``GroupCoordinator.barrier`` of all workers.
        """
        self.expertier.serve(promised, get_world_group().barrier)
        self._reporter = Reporter(Board(self.vllm_config.instance_id), self.expertier.stats)
        self._reporter.start()

    # ---- steps that fail

    def execute_model(self, scheduler_output: Any) -> Any:
        """Turn an expert that cannot be loaded, or scores that are no numbers, into a failed step, whose requests end.

        Other workers wait for this one: in every layer those of its tensor parallel group, after it the next stage of a
        pipeline. One that lacks an expert goes on with zeros (``ForwardPass.run``), and after the step the others learn
        that it is worthless.
        """
        self.expertier.forward.failure = self._failed = None
        self._step_tokens = scheduler_output.total_num_scheduled_tokens
        problem = None
        try:
            with self.expertier.budget.stepping:
                output = super().execute_model(scheduler_output)  # type: ignore[misc]
            if self.expertier.facts.in_step and self._step_tokens:
                failure = self.expertier.forward.failure
                problem = self._failures.settle(None if failure is None else str(failure))
        except (ExpertLoadError, RouterScoresError) as error:
            problem = str(error)
        if problem is None:
            return output
        if self.vllm_config.scheduler_config.scheduler_cls not in (SCHEDULER, REGROUPING):
            raise ExpertLoadError(problem)  # another scheduler would take the step for a good one
        self.model_runner.execute_model_state = None  # what sample_tokens would go on with
        self._failed = _failed_step(scheduler_output, problem)
        return self._failed

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Send the routes of the step along with its tokens; upstream: the second half of ``execute_model``.

        It is called for a failed step, too, where several are under way (``EngineCore.step_with_batch_queue``).
        """
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self._failed is not None:
            return self._failed
        log = self.expertier.forward.route_log
        if log is not None and isinstance(output, ModelRunnerOutput):
            setattr(output, ROUTES, log.take(self._step_tokens))
        return output

    def shutdown(self) -> None:
        super().shutdown()  # type: ignore[misc]
        if hasattr(self, "_reporter"):
            self._reporter.close()
        if hasattr(self, "expertier"):
            self.expertier.close()

    # ---- reached through collective_rpc

    def expertier_stats(self) -> dict[str, Any]:
        """Counters of this worker; see :meth:`expertier_vllm.runtime.Runtime.stats`."""
        return self.expertier.stats()

    def expertier_note(self, values: dict[str, Any]) -> None:
        """Leave measurements in the trace that this worker records, if it does."""
        self.expertier.note(values)

    def expertier_end_trace(self) -> None:
        """Complete the trace that this worker records, if it does; nothing is recorded from then on."""
        self.expertier.end_trace()

    def expertier_set_virtual(self, bias: float, protect: int) -> dict[str, Any]:
        """Change the bias of stand-ins; returns as :meth:`expertier_resize` does where it is refused."""
        return _answered(lambda: self.expertier.set_virtual(bias, protect))

    def expertier_resize(self, budget: str | int) -> dict[str, Any]:
        """Change this worker's budget.

        Returns
        -------
        dict
            ``budget_bytes``, or ``error`` with its ``type``, ``problem`` and ``remedy``: as an exception, a refusal
            would reach the caller as a line of text inside another one.
        """
        before, self._budget_before = self.expertier.budget.total, None
        answer = _answered(lambda: {"budget_bytes": self.expertier.budget.resize(budget)})
        if "error" not in answer:
            self._budget_before = before
        return answer

    def expertier_undo_resize(self) -> None:
        """Return to the budget before the last change, because another worker refused that."""
        before, self._budget_before = self._budget_before, None
        if before is not None:
            self.expertier.budget.resize(before)


def _answered(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return call()
    except ExpertierError as error:
        return {"error": {"type": type(error).__name__, "problem": error.problem, "remedy": error.remedy}}


def _refused(name: str) -> Callable[..., None]:
    def refuse(self: ManagedWorker, *_: Any, **__: Any) -> None:
        raise UnsupportedOptionError(
            f"{name} is not possible: the experts' weights are not in the model but in Expertier's sidecar.",
            "Start a server without Expertier for it.",
        )

    return refuse


for _name in (
    "compute_weight_checksums",
    "reload_weights",
    "reset_weights",
    "save_sharded_state",
    "save_tensorized_model",
    "start_draft_weight_update",
    "start_weight_update",
    "update_weights",
):
    setattr(ManagedWorker, _name, _refused(_name))


@contextlib.contextmanager
def _own_iterator(files: CheckpointFiles) -> Iterator[None]:
    """Have weights iterated over by us while a model loads.

    Upstream: ``default_loader.safetensors_weights_iterator``, called with the files to load once they have been chosen.
    safetensors' ``get_tensor`` has the system read ahead what nobody wants.
    """
    stock = default_loader.safetensors_weights_iterator

    def iterator(hf_weights_files: list[str], *_: Any, **__: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return files.tensors(sorted(hf_weights_files, key=_natural_sort_key))

    default_loader.safetensors_weights_iterator = iterator
    try:
        yield
    finally:
        default_loader.safetensors_weights_iterator = stock


def _failed_step(scheduler_output: Any, problem: str) -> ModelRunnerOutput:
    requests = list(scheduler_output.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=requests,
        req_id_to_index={request: index for index, request in enumerate(requests)},
        sampled_token_ids=[[] for _ in requests],
    )
    setattr(output, PROBLEM, problem)
    return output


def _checkpoint(model: Any, load: Any) -> Path:
    """Directory of a model's files; one that is named and not local is fetched as stock would, a moment later.

    Upstream: ``DefaultModelLoader._prepare_weights``, which knows ``--download-dir`` and fetches only the weights that
    are loaded, where a repository may hold them in other forms, too. The configuration is never put there by stock.
    """
    path = Path(model.model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    folder, *_ = default_loader.DefaultModelLoader(load)._prepare_weights(
        model.model, None, model.revision, fall_back_to_pt=True, allow_patterns_overrides=None
    )
    if not (Path(folder) / CONFIG_NAME).exists():
        snapshot_download(
            model.model, revision=model.revision, cache_dir=load.download_dir, allow_patterns=[CONFIG_NAME]
        )
    return Path(folder)


_NORMS: Final = ("post_attention_layernorm", "ffn_norm", "pre_feedforward_layernorm")


def _norms(model: torch.nn.Module) -> dict[int, Any]:
    """Find the weights of the norm in front of each layer's router, shape (hidden,), in float32.

    They are looked for by name in the blocks around the experts; what is not found only makes the lookahead less exact.
    The routers themselves are read from the checkpoint: once loaded, vLLM rearranges their weights for its kernels
    (``dispatch_cpu_unquantized_gemm``) and leaves an empty tensor.
    """
    modules = dict(model.named_modules())
    norms = {}
    for name, module in modules.items():
        stage = getattr(module, "managed", None)
        if stage is None:
            continue
        parts = name.split(".")
        around = [modules[".".join(parts[:depth])] for depth in range(len(parts) - 1, 0, -1)]
        norm = _weight(around, _NORMS, 1)
        if norm is not None:
            norms[stage.layer] = norm
    return norms


def _weight(blocks: list[torch.nn.Module], names: tuple[str, ...], dimensions: int) -> Any:
    for block in blocks:
        for name in names:
            weight = getattr(getattr(block, name, None), "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() == dimensions:
                return np.ascontiguousarray(weight.detach().float().cpu().numpy())
    return None
