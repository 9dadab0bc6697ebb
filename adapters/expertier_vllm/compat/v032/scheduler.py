"""vLLM 0.32: the scheduler. Imported only where ``SchedulerConfig.scheduler_cls`` names it."""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler


class ExpertierScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler."""
