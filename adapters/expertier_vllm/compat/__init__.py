"""Every touch of vLLM's internals, one package per verified version. Nothing else in the adapter imports vLLM."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Final

from expertier.errors import UnsupportedEngineError
from expertier_vllm.options import VllmOptions

VERIFIED: Final = {"0.32": "v032", "0.33": "v033"}
"""Releases whose internals were read, and the package that touches them."""


def verified(version: str) -> str | None:
    """Name of the package for a version of vLLM; ``None`` if its internals were not read."""
    return VERIFIED.get(".".join(version.split(".")[:2]))


CPU_BUILD: Final = "python examples/setup/install_vllm.py in Expertier's repository (pip alone leaves it broken)"
"""How to install the build of vLLM in which experts are managed."""


def watch_configurations() -> None:
    """Have every ``VllmConfig`` checked for Expertier's key once it is complete.

    Upstream: ``vllm.config.VllmConfig``, built by ``EngineArgs.create_engine_config`` in the process that the user
    starts. There is no hook for plugins, and this is the one place where a refusal reaches the user as an exception
    before anything is loaded. ``__init__`` and not ``__post_init__``: pydantic turns what the latter raises into
    validation errors.
    """
    try:
        from vllm.config import VllmConfig
    except ImportError:
        return
    stock = VllmConfig.__init__
    if hasattr(stock, "expertier"):
        return

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        options = VllmOptions.from_additional_config(self.additional_config)
        if options is not None:
            engine().take_over(self)

    init.expertier = True  # type: ignore[attr-defined]
    VllmConfig.__init__ = init


def engine_version() -> str:
    """Return the version of the installed vLLM.

    Raises
    ------
    UnsupportedEngineError
        There is none.
    """
    try:
        from vllm import __version__
    except ImportError as error:
        raise UnsupportedEngineError(
            f"vLLM cannot be imported: {error}.", f"Install its CPU build: {CPU_BUILD}."
        ) from error
    return str(__version__)


@functools.cache
def engine() -> Any:
    """Return the module for the installed vLLM: ``take_over(config)``.

    Raises
    ------
    UnsupportedEngineError
        There is no vLLM, or one of a version whose internals were not verified.
    """
    version = engine_version()
    name = verified(version)
    if name is None:
        raise UnsupportedEngineError(
            f"This Expertier does not know vLLM {version}.", f"Install one of: {', '.join(VERIFIED)}."
        )
    return importlib.import_module(f"expertier_vllm.compat.{name}")
