"""Expertier inside vLLM: ``--additional-config '{"expertier": {"budget": "50%"}}'`` bounds the memory of experts."""

from __future__ import annotations

from typing import Any

__all__ = ["RegroupingScheduler", "register"]


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: called in every process before it builds a configuration.

    Nothing changes for a server that does not ask for Expertier, and nothing heavy is imported here. Calling it again
    does nothing.
    """
    from expertier_vllm.compat import watch_configurations

    watch_configurations()


def __getattr__(name: str) -> Any:
    """Find ``--scheduler-cls expertier_vllm.RegroupingScheduler`` for the installed vLLM, where vLLM asks for it."""
    if name == "RegroupingScheduler":
        from expertier_vllm.compat import engine

        return engine().regrouping_scheduler()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
