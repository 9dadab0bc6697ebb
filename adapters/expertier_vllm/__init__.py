"""Expertier inside vLLM: ``--additional-config '{"expertier": {"budget": "50%"}}'`` keeps a bounded set of experts in memory."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: vLLM calls it in every process before it builds a configuration.

    Nothing changes for a server that does not ask for Expertier, and nothing heavy is imported here. Calling it again
    does nothing.
    """
    from expertier_vllm.compat import watch_configurations

    watch_configurations()
