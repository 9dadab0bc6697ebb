"""How the command line meets engines: it knows this protocol, and each adapter brings an object that fulfils it."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from expertier.catalog.types import Catalog
from expertier.comparison.schedulers import TrafficServer
from expertier.config import OffloadOptions
from expertier.errors import UnsupportedEngineError
from expertier.telemetry import Stats

GROUP = "expertier.adapters"
# For a source tree that is on the path but not installed.
_MODULES = {"llamacpp": "expertier_llamacpp.adapter:ADAPTER", "vllm": "expertier_vllm.adapter:ADAPTER"}

FindingStatus = Literal["ok", "info", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of ``expertier doctor``.

    Attributes
    ----------
    topic : str
        What was looked at.
    status : str
        ``problem`` means that something will be refused.
    text : str
        What was found.
    remedy : str
        What can be done about it.
    """

    topic: str
    status: FindingStatus
    text: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class StockVariant:
    """One way of running the stock engine that a fair comparison includes.

    Attributes
    ----------
    key, label : str
        Short name and the name people read.
    settings : dict
        Handed to the worker as they are.
    obstacle : str
        Why this machine cannot run it; empty if it can.
    """

    key: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    obstacle: str = ""


@dataclass(frozen=True, kw_only=True)
class Workloads:
    """What a comparison with an engine measures unless told otherwise.

    Attributes
    ----------
    limits : tuple of str
        Memory limits.
    budgets : tuple of str
        Budgets of further Expertier arms without a limit, besides the largest one.
    requests : tuple of int
        Numbers of requests at a time; empty if the worker measures single sequences alone.
    evidence : str
        Whether the worker digests all logits, or the greedy tokens.
    readahead : bool
        Whether the stock engine maps its weights, so that readahead matters to it.
    """

    limits: tuple[str, ...] = ("33%", "60%", "none")
    budgets: tuple[str, ...] = ()
    requests: tuple[int, ...] = ()
    evidence: Literal["logits", "tokens"] = "logits"
    readahead: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of the engine itself: context length (``None``: a usual one), tokens per prompt step and threads."""

    n_ctx: int | None = None
    n_ubatch: int = 512
    threads: int = 1


class Session(Protocol):
    """A loaded model that generates text."""

    def mode_line(self) -> str:
        """One line that says what is being done."""

    def generate(
        self, prompt: str, *, chat: bool, max_tokens: int, temperature: float, seed: int | None
    ) -> Iterator[str]:
        """Yield pieces of text as they are decoded."""

    def stats(self) -> Stats:
        """Return the manager's counters."""

    def close(self) -> None:
        """Free everything."""


class Adapter(Protocol):
    """What an engine's adapter tells the command line. Making one must not import the engine.

    Attributes
    ----------
    name : str
        As in ``--engine``.
    engine : str
        The engine's own name.
    install : str
        How to get the engine where it is missing; the way out of an error.
    workloads : Workloads
        What its worker measures.
    """

    name: str
    engine: str
    install: str
    workloads: Workloads

    def versions(self) -> dict[str, str]:
        """Installed distributions that matter, empty if the engine is missing. Does not import the engine."""

    def findings(self, catalog: Catalog | None) -> Sequence[Finding]:
        """What would be refused, with this model if one is given. May import the engine."""

    def stock_variants(self, catalog: Catalog, *, limited: bool) -> Sequence[StockVariant]:
        """Ways of running the stock engine; with `limited` those that make sense in too little memory, best first."""

    def worker_command(self) -> Sequence[str]:
        """Return the command that measures one arm: a JSON job on stdin, a JSON record on stdout.

        The fields of the job are those :meth:`expertier.comparison.runner.Runner.run` sends; the record has a
        ``status`` and either ``figures`` (:class:`expertier.comparison.records.Figures`) or a ``reason``.
        """

    def open(self, model: Path, options: OffloadOptions, settings: EngineSettings) -> Session:
        """Load a model with Expertier."""

    def open_traffic(
        self, model: Path, options: OffloadOptions, settings: EngineSettings, *, batch: int, context: int
    ) -> TrafficServer:
        """Load a model with Expertier for `batch` requests at a time, of at most `context` tokens each."""


def find_adapters() -> tuple[dict[str, Adapter], dict[str, str]]:
    """Load all adapters.

    Returns
    -------
    adapters : dict of str to Adapter
        By name.
    reasons : dict of str to str
        Adapters that cannot be loaded, with the reason.
    """
    targets = dict(_MODULES)
    targets.update({entry.name: entry.value for entry in importlib.metadata.entry_points(group=GROUP)})
    adapters: dict[str, Adapter] = {}
    reasons: dict[str, str] = {}
    for name, target in sorted(targets.items()):
        module, _, attribute = target.partition(":")
        try:
            adapters[name] = cast(Adapter, getattr(importlib.import_module(module), attribute))
        except ImportError as error:
            reasons[name] = str(error)
    return adapters, reasons


def get_adapter(name: str) -> Adapter:
    """Load one adapter.

    Raises
    ------
    UnsupportedEngineError
        It is unknown, cannot be loaded, or its engine is not installed.
    """
    adapters, reasons = find_adapters()
    if name in reasons:
        raise UnsupportedEngineError(
            f"The adapter for {name} cannot be loaded: {reasons[name]}.",
            f"Install it: pip install 'expertier[{name}]'.",
        )
    if name not in adapters:
        known = ", ".join(sorted(adapters)) or "none"
        raise UnsupportedEngineError(f"There is no adapter for an engine called {name!r}.", f"Installed: {known}.")
    if not adapters[name].versions():
        raise UnsupportedEngineError(f"{adapters[name].engine} is not installed.", adapters[name].install)
    return adapters[name]
