"""vLLM 0.33: what differs from 0.32. Everything else that is touched is the same there, and taken from it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from expertier_vllm.compat.v032 import read_facts, regrouping_scheduler, take_over, tell_causes

__all__ = ["fail_requests", "read_facts", "regrouping_scheduler", "take_over", "tell_causes"]


def fail_requests(scheduler: Any, requests: Set[str], problem: str) -> None:
    """Have a scheduler end requests at its next chance, because of `problem`.

    Upstream: ``Scheduler.grammar_compile_error_reqs``, in 0.33 a table with the error that every client is told. They
    end with FINISHED_ERROR, which the API server answers with status 500.
    """
    from vllm.outputs import RequestError

    error = RequestError(code="expert_load_error", message=problem)
    scheduler.grammar_compile_error_reqs |= dict.fromkeys(requests, error)
