"""Expertier inside vLLM: ``--additional-config '{"expertier": {"budget": "50%"}}'`` bounds the memory of experts."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: called in every process before it builds a configuration.

    Nothing changes for a server that does not ask for Expertier, and nothing heavy is imported here. Calling it again
    does nothing.
    """
    from expertier_vllm.compat import watch_configurations

    watch_configurations()
