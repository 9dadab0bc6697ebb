"""Options of the vLLM adapter: what stands under ``expertier`` in ``--additional-config``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from expertier.budget import parse_budget
from expertier.config import OffloadOptions
from expertier.errors import UnsupportedOptionError
from expertier.quality.budget import parse_quality_budget
from expertier.scheduling import BATCHERS, Fairness
from expertier.scheduling.fairness import OPTIONS as FAIRNESS

KEY: Final = "expertier"
"""Key in ``--additional-config`` that turns Expertier on."""


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """Everything a user can set under ``expertier``.

    Attributes
    ----------
    offload : OffloadOptions
        The options that all engines share.
    host_budget : str, int or None
        Puts experts into slots over a tier of so much host memory, as a device needs: `budget` is what the slots take,
        and both tiers follow one policy. ``None``: experts are where the processor computes, and a device's are over
        :func:`expertier_vllm.slots.usual_host_bytes`.
    budget_endpoint : bool
        Whether ``POST /expertier/budget`` changes the budget of a running server. Off unless asked for, because
        whoever reaches the server's port could use it.
    scheduler : str or None
        Who of the waiting requests joins: a key of :data:`expertier.scheduling.BATCHERS`. ``None`` is vLLM's order, or
        ``similarity`` where ``--scheduler-cls`` names ``expertier_vllm.RegroupingScheduler``.
    fairness : Fairness
        How far that may set a request back: ``fairness_overtaken``, ``fairness_steps``,
        ``fairness_held`` and ``fairness_seconds``.
    """

    offload: OffloadOptions = field(default_factory=OffloadOptions)
    host_budget: str | int | None = None
    budget_endpoint: bool = False
    scheduler: str | None = None
    fairness: Fairness = field(default_factory=Fairness)

    @property
    def lossy(self) -> bool:
        """Whether resident experts may stand in for absent ones."""
        offload = self.offload
        if offload.virtual_bias is not None or offload.virtual_hard == "on":
            return True
        return parse_quality_budget(offload.quality_budget).kind != "exact"

    @classmethod
    def from_additional_config(cls, additional: object) -> VllmOptions | None:
        """Read vLLM's ``additional_config``.

        Parameters
        ----------
        additional : object
            A mapping, or what a platform has put in its place.

        Returns
        -------
        VllmOptions or None
            ``None`` when Expertier was not asked for.

        Raises
        ------
        UnsupportedOptionError
            For an unknown key, naming the nearest known one, or a value that an option cannot have.
        BudgetError
            For a budget that is not an amount.
        """
        if not isinstance(additional, Mapping) or KEY not in additional:
            return None
        given = additional[KEY]
        if not isinstance(given, Mapping):
            raise UnsupportedOptionError(
                f"additional_config[{KEY!r}] is {given!r}, not an object.",
                f"""Write --additional-config '{{"{KEY}": {{"budget": "50%"}}}}'.""",
            )
        own = {option.name for option in fields(cls)} - {"offload", "fairness"}
        shared = {option.name for option in fields(OffloadOptions)}
        known = {*own, *shared, *FAIRNESS}
        for name in given:
            if name not in known:
                raise _unknown(str(name), sorted(known))
        offload = OffloadOptions.from_mapping({name: given[name] for name in given if name in shared})
        offload.check_trace()
        if offload.repack == "off":
            raise UnsupportedOptionError(
                "repack='off' is not possible in vLLM: its kernels compute on rearranged weights only.",
                "Leave repack at 'auto'.",
            )
        parse_budget(offload.budget, 1 << 60)  # a slip of the pen is told before any work
        found = cls(
            offload=offload,
            fairness=Fairness.from_options(given),
            **{name: _own(name, given[name]) for name in given if name in own},
        )
        if found.host_budget is not None:
            found.check_slots()
        return found

    def check_slots(self) -> None:
        """Refuse what is not known to work with experts in slots, which a device needs.

        Raises
        ------
        UnsupportedOptionError
            It was asked for.
        BudgetError
            The host budget is not an amount.
        """
        offload, where = self.offload, "with experts in slots (host_budget, or a GPU)"
        host = None if self.host_budget is None else parse_budget(self.host_budget, 1 << 60)
        if parse_budget(offload.budget, 1 << 60) is None or (self.host_budget is not None and host is None):
            raise UnsupportedOptionError(
                f"A budget of 'auto' is not possible {where}: they are allocated before the KV cache has its memory.",
                "Give amounts, e.g. 8GiB or 50%.",
            )
        for name, wanted in {
            "trace": offload.trace is not None,
            "governor": offload.governor != "off",
            "virtual_bias": offload.virtual_bias is not None,
            "virtual_hard": offload.virtual_hard == "on",
            "quality_budget": parse_quality_budget(offload.quality_budget).kind != "exact",
        }.items():
            if wanted:
                raise UnsupportedOptionError(f"{name} is not possible {where}.", "Leave it out.")


def _own(name: str, value: Any) -> Any:
    if name == "host_budget":
        return value
    if name != "scheduler":
        return _flag(name, value)
    if value is not None and not (isinstance(value, str) and value in BATCHERS):
        raise UnsupportedOptionError(f"scheduler={value!r} is not possible.", f"Choose from: {', '.join(BATCHERS)}.")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UnsupportedOptionError(f"{name}={value!r} is not possible.", "Choose from: true, false.")
    return value


def _unknown(name: str, known: list[str]) -> UnsupportedOptionError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return UnsupportedOptionError(f"Expertier has no option {name!r}.", f"{hint}Options are: {', '.join(known)}.")
