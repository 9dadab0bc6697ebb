"""vLLM 0.32 and 0.33: the scheduler. Imported only where ``SchedulerConfig.scheduler_cls`` names it."""

from __future__ import annotations

import logging
from typing import Any, Final

from vllm.v1.core.sched.scheduler import Scheduler

from expertier_vllm.compat import engine

logger = logging.getLogger("vllm.expertier")

PROBLEM: Final = "expertier_problem"
"""Attribute of a ``ModelRunnerOutput``, a plain dataclass that crosses processes by pickle: why the step failed."""

ROUTES: Final = "expertier_routes"
"""The same: a :class:`expertier_vllm.route_log.StepRoutes`, if the scheduler regroups requests."""


EXACT: Final = "expertier_exact"
"""Key in ``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP): no expert may stand in for this request's."""


def wants_exactness(parameters: Any) -> bool:
    """Whether a request asked for exactness; anything but a clear no is a yes."""
    given = (getattr(parameters, "extra_args", None) or {}).get(EXACT, False)
    return given not in (False, 0, None, "", "0", "false", "no", "off")


class ExpertierScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, which ends the requests of a step whose experts could not be loaded.

    In stock, whatever a worker raises ends the server. A disk that fails once need not.
    """

    def add_request(self, request: Any) -> None:
        """Keep a request that asked for exactness away from what others computed with stand-ins and left in the cache.

        Upstream: ``Request.skip_reading_prefix_cache``.
        """
        if wants_exactness(request.sampling_params):
            request.skip_reading_prefix_cache = True
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        problem = getattr(model_runner_output, PROBLEM, None)
        if problem is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        failed = set(scheduler_output.num_scheduled_tokens)
        # Blocks are offered to other requests when they are scheduled, before they are computed: these never were. Who
        # left or was preempted meanwhile holds none, so all are forgotten. Upstream: ``BlockPool.evict_blocks``.
        self.kv_cache_manager.evict_blocks(set(range(len(self.kv_cache_manager.block_pool.blocks))))
        if self.vllm_config.max_concurrent_batches > 1:  # a step under way may have been offered them
            failed |= {request.request_id for request in self.running}
        logger.error("A step failed, and %d requests with it: %s", len(failed), problem)
        engine().fail_requests(self, failed, problem)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            for output in client.outputs:
                if output.request_id in failed:
                    output.stop_reason = problem
        return outputs
