"""vLLM 0.32: what the process that builds the configuration needs."""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import replace
from typing import Any, Final

from expertier.errors import UnsupportedOptionError
from expertier_vllm.board import publish
from expertier_vllm.compat.v032.graphs import split_at_experts
from expertier_vllm.options import VllmOptions
from expertier_vllm.refusals import ServerFacts, check_server

logger = logging.getLogger("vllm.expertier")

_STOCK_WORKERS: Final = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
}
WORKERS: Final = {
    "cpu": "expertier_vllm.compat.v032.cpu_worker.ExpertierWorker",
    "cuda": "expertier_vllm.compat.v032.cuda_worker.ExpertierCudaWorker",
}
"""By platform."""
SCHEDULER: Final = "expertier_vllm.compat.v032.scheduler.ExpertierScheduler"
REGROUPING: Final = "expertier_vllm.RegroupingScheduler"
"""What ``--scheduler-cls`` may name; :mod:`expertier_vllm` finds the class for the installed vLLM."""


def take_over(config: Any) -> None:
    """Check a complete ``VllmConfig`` and name our worker and scheduler in it.

    Upstream: ``ParallelConfig.worker_cls`` and ``SchedulerConfig.scheduler_cls``, the options ``--worker-cls`` and
    ``--scheduler-cls``. Both are names, resolved in the processes that need them. A view of a model's part
    (``ModelConfig.is_submodel_config``) repeats the configuration of the whole, which was checked.

    Raises
    ------
    ExpertierError
        Expertier cannot take over; see :mod:`expertier_vllm.refusals`.
    """
    if config.model_config is None or config.model_config.is_submodel_config:
        return
    wanted = VllmOptions.from_additional_config(config.additional_config)
    facts = replace(read_facts(config), virtual=wanted is not None and wanted.lossy)
    check_server(facts)
    parallel, scheduler = config.parallel_config, config.scheduler_config
    if parallel.worker_cls not in (_STOCK_WORKERS[facts.platform], WORKERS[facts.platform]):
        raise UnsupportedOptionError(
            f"--worker-cls {parallel.worker_cls} is not vLLM's own.", "Start without it, or without Expertier."
        )
    if facts.platform == "cuda" and wanted is not None:
        _prepare_device(config, wanted)
    parallel.worker_cls = WORKERS[facts.platform]
    if wanted is not None and wanted.scheduler is not None:
        if scheduler.scheduler_cls not in (None, SCHEDULER, REGROUPING):
            raise UnsupportedOptionError(
                f"scheduler={wanted.scheduler!r} and --scheduler-cls {scheduler.scheduler_cls} exclude each other.",
                "Give one of the two.",
            )
        scheduler.scheduler_cls = REGROUPING
    elif scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULER
    publish(config.instance_id)
    tell_causes()


def _prepare_device(config: Any, wanted: VllmOptions) -> None:
    """Settle what is different where experts are in slots of a device."""
    wanted.check_slots()
    split_at_experts(config)
    scheduler = config.scheduler_config
    if scheduler.async_scheduling:
        # Upstream: what the CPU platform does, too. Our scheduler wants to know a step's outcome before the next.
        scheduler.async_scheduling = False
        logger.info("expertier: asynchronous scheduling is off: every layer waits for its router anyway")
    if config.parallel_config.worker_cls != WORKERS["cuda"]:  # vLLM completes a configuration more than once
        logger.warning("expertier: experts on CUDA have never been run on a GPU; compare the output with stock's")


def tell_causes() -> None:
    """Have failed requests answered with their cause in this process, if it serves any."""
    from expertier_vllm.compat.v032 import causes

    causes.tell_causes()


def regrouping_scheduler() -> Any:
    """Return the class that ``--scheduler-cls expertier_vllm.RegroupingScheduler`` means."""
    from expertier_vllm.compat.v032.regrouping import RegroupingScheduler

    return RegroupingScheduler


def fail_requests(scheduler: Any, requests: Set[str], problem: str) -> None:
    """Have a scheduler end requests at its next chance, because of `problem`.

    Upstream: ``Scheduler.grammar_compile_error_reqs``, whose requests end with FINISHED_ERROR, which the API server
    answers with status 500. Why is told another way (``causes.py``).
    """
    scheduler.grammar_compile_error_reqs |= requests


def read_facts(config: Any) -> ServerFacts:
    """Read off a ``VllmConfig`` what :func:`expertier_vllm.refusals.check_server` wants to know."""
    from vllm.platforms import current_platform

    model, parallel, load = config.model_config, config.parallel_config, config.load_config
    extra = load.model_loader_extra_config
    return ServerFacts(
        platform=str(current_platform.device_name),
        model=str(model.model),
        experts=int(model.get_num_experts()),
        load_format=str(load.load_format),
        load_strategy=load.safetensors_load_strategy,
        multithread_load=isinstance(extra, dict) and bool(extra.get("enable_multithread_load")),
        data_parallel=parallel.data_parallel_size,
        tensor_parallel=parallel.tensor_parallel_size,
        context_parallel=max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size),
        expert_parallel=parallel.enable_expert_parallel,
        eplb=parallel.enable_eplb,
        micro_batches=parallel.enable_dbo,
        lora=config.lora_config is not None,
        speculative=config.speculative_config is not None,
        sleep_mode=model.enable_sleep_mode,
        weight_offload=config.offload_config.uva.cpu_offload_gb > 0
        or config.offload_config.prefetch.offload_group_size > 0,
        elastic=bool(parallel.enable_elastic_ep),
        second_runner=bool(config.use_v2_model_runner),
    )
