"""A quality budget while an engine serves: refused at start if it cannot be kept, steered afterwards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from expertier.catalog.types import Catalog
from expertier.config import OffloadOptions
from expertier.errors import QualityBudgetError
from expertier.quality.budget import QualityBudget, Setting, check_hard, parse_quality_budget, resolve
from expertier.quality.controller import QualityController, QualityStats
from expertier.quality.profile import QualityProfile, find_profile
from expertier.virtual import VirtualExperts

logger = logging.getLogger("expertier")


class QualityKeeper:
    """Keeps a percentage of perplexity: resolves it at every memory budget and watches what it costs.

    Parameters
    ----------
    budget : QualityBudget
        A percentage.
    profile : QualityProfile
        Of the model that is served.
    """

    def __init__(self, budget: QualityBudget, profile: QualityProfile) -> None:
        self.budget = budget
        self.profile = profile
        self._controller = QualityController(profile.proxy, increase=budget.value, bias=0.0)
        self._memory: Callable[[], int] = lambda: 0
        self._total = 1
        self._at = -1
        self._uncovered = ""
        self._told = False

    def attach(self, virtual: VirtualExperts, memory: Callable[[], int], total: int, *, definite: bool) -> None:
        """Begin to steer.

        Parameters
        ----------
        virtual : VirtualExperts
            Whose bias to set, after every step from now on.
        memory : callable
            Gives the memory budget in bytes.
        total : int
            What all experts take.
        definite : bool
            Whether the memory budget was stated, so that one which cannot be covered is refused; otherwise the model
            is exact until there is more.

        Raises
        ------
        QualityBudgetError
            The quality budget cannot be kept with this memory, or only some of the model's layers are here.
        """
        covered, here = len(self.profile.proxy.weights), len(virtual.mass)
        if covered != here:
            raise QualityBudgetError(
                f"A quality budget of {self.budget} is told by all {covered} layers with experts together, and this "
                f"worker has {here} of them.",
                "Leave pipeline parallelism out, or give a virtual_bias.",
            )
        self._memory, self._total = memory, total
        if definite:
            share = memory() / total
            if virtual.hard:
                check_hard(self.budget, self.profile, share)
            else:
                resolve(self.budget, self.profile, share)
        self._cover(virtual, memory())
        virtual.after_step = self

    def __call__(self, virtual: VirtualExperts) -> None:
        """Look at the counters after a step."""
        memory = self._memory()
        if memory != self._at:
            self._cover(virtual, memory)
        if not virtual.hard:
            self._controller(virtual)

    def stats(self, virtual: VirtualExperts) -> QualityStats:
        """Return where the budget stands."""
        return self._controller.stats(virtual)

    def words(self, virtual: VirtualExperts) -> str:
        """What the mode line says of it."""
        if self._uncovered:
            return f"exact: {self._uncovered}"
        found = self.stats(virtual)
        backed_off = f", backed off from {found.calibrated_bias:.3g}" if found.bias < found.calibrated_bias else ""
        spent = f", {100 * found.spent:.2g}% estimated" if found.tokens else ""
        return f"{virtual.words()}{backed_off}, at most {self.budget} perplexity{spent}"

    def _cover(self, virtual: VirtualExperts, memory: int) -> None:
        self._at = memory
        share = memory / self._total
        setting = Setting(bias=0.0, protect=virtual.settings.protect, loads_per_token=0.0)
        try:
            if virtual.hard:
                check_hard(self.budget, self.profile, share)
                setting = replace(setting, bias=math.inf)
            else:
                setting = resolve(self.budget, self.profile, share)
            self._uncovered = ""
        except QualityBudgetError as error:
            if not self._told:  # budget "auto" is less while a prompt is computed, every time
                self._told = True
                logger.warning("%s", error)
            self._uncovered = error.problem
        if virtual.hard:
            virtual.bias = setting.bias
        else:
            virtual.settings = replace(virtual.settings, protect=setting.protect)
            self._controller.covers(virtual, setting.bias)


def describe_losses(virtual: VirtualExperts | None, keeper: QualityKeeper | None) -> dict[str, Any]:
    """Put what stand-ins did and where the quality budget stands into plain data, ready for JSON.

    Returns
    -------
    dict
        ``virtual`` (:class:`expertier.virtual.VirtualStats`) and ``quality`` (:class:`QualityStats`), as far as there
        are any; a bias of ``None`` is infinite.
    """
    if virtual is None:
        return {}
    found = {"virtual": asdict(virtual.stats())}
    if keeper is not None:
        found["quality"] = asdict(keeper.stats(virtual))
    return {
        name: {**stats, "bias": None if stats["bias"] == math.inf else stats["bias"]} for name, stats in found.items()
    }


def words_of_losses(virtual: VirtualExperts | None, keeper: QualityKeeper | None) -> str:
    """What the mode line says of losses, or that there are none."""
    if virtual is None:
        return "lossless"
    return virtual.words() if keeper is None else keeper.words(virtual)


def read_quality_budget(options: OffloadOptions, catalog: Catalog) -> tuple[OffloadOptions, QualityKeeper | None]:
    """Turn the option ``quality_budget`` into those of virtual experts, before anything is loaded.

    Parameters
    ----------
    options : OffloadOptions
        What the user set.
    catalog : Catalog
        The model.

    Returns
    -------
    options : OffloadOptions
        With ``virtual_bias`` where stand-ins are wanted.
    keeper : QualityKeeper or None
        To be attached once the memory budget is known, where a percentage was stated.

    Raises
    ------
    QualityBudgetError
        It cannot be read, or contradicts another option.
    QualityProfileError
        A percentage has no profile to stand on.
    """
    budget = parse_quality_budget(options.quality_budget)
    if options.quality_budget is None:
        return options, None
    hard = options.virtual_hard == "on"
    rivals = [name for name in ("virtual_bias", "virtual_protect") if getattr(options, name) is not None]
    if budget.kind != "perplexity" and hard:
        rivals.append("virtual_hard")
    if budget.kind == "bias" and "virtual_protect" in rivals:
        rivals.remove("virtual_protect")
    if rivals:
        raise QualityBudgetError(
            f"quality_budget={options.quality_budget} and {' and '.join(rivals)} contradict each other.", "Give one."
        )
    if budget.kind == "exact":
        return options, None
    if budget.kind == "bias":
        return replace(options, virtual_bias=budget.value), None
    keeper = QualityKeeper(budget, find_profile(catalog, options.sidecar_dir, policy=options.plain_policy))
    return (options if hard else replace(options, virtual_bias=0.0)), keeper
