"""Which arms a fair comparison has: the stock engine at its best under every limit, and Expertier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from expertier.budget import format_bytes, parse_budget
from expertier.catalog.types import Catalog
from expertier.comparison.quality import is_lossy
from expertier.comparison.records import ArmRecord
from expertier.errors import BudgetError, UnsupportedOptionError
from expertier.quality.budget import parse_quality_budget

if TYPE_CHECKING:
    from expertier.cli.engines import Adapter

USUAL_READAHEAD_KB = 128
"""What Linux sets unless told otherwise, and better than much more for experts read by page faults."""

_OURS = "expertier"
_NO_STAND_INS = {"virtual_bias": None, "virtual_protect": None, "virtual_hard": "off"}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A memory limit as written, and in bytes (``None`` = no limit)."""

    text: str
    limit_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Ability:
    """What this machine allows.

    Attributes
    ----------
    confinement : str
        Why no memory limit can be enforced, empty if one can.
    readahead : str
        Why the readahead cannot be changed, empty if it can.
    readahead_kb : int or None
        The readahead as found.
    memory_left : int
        Bytes a process may still use.
    """

    confinement: str
    readahead: str
    readahead_kb: int | None
    memory_left: int


def parse_limit(text: str, file_bytes: int) -> Limit:
    """Read a limit: ``none``, a percentage of the model's files, or an amount of memory.

    Raises
    ------
    BudgetError
        It is none of these.
    """
    if text.strip().lower() == "none":
        return Limit(text="none", limit_bytes=None)
    try:
        amount = parse_budget(text, file_bytes)
    except BudgetError as error:
        problem = error.problem.replace("budget", "limit").replace("all experts", "the whole model")
        raise BudgetError(problem, "Write e.g. 33% (of the model), 4GiB or none.") from error
    if amount is None:
        raise BudgetError("A limit cannot be 'auto'.", "Write e.g. 33% (of the model), 4GiB or none.")
    return Limit(text=text.strip(), limit_bytes=amount)


def parse_variant(text: str) -> tuple[str, dict[str, str]]:
    """Read ``NAME:option=value,option=value``.

    Raises
    ------
    UnsupportedOptionError
        It is written in another way.
    """
    name, colon, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")]
    if not (name.strip() and colon and all(key.strip() and equals for key, equals, _ in pairs)):
        raise UnsupportedOptionError(
            f"The variant {text!r} cannot be read.", "Write NAME:option=value,option=value, e.g. lru:policy=lru."
        )
    return name.strip(), {key.strip().replace("-", "_"): value.strip() for key, _, value in pairs}


def plan_arms(
    adapter: Adapter,
    catalog: Catalog,
    limits: Sequence[Limit],
    options: Mapping[str, Any],
    *,
    ability: Ability,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    only: Sequence[str] | None = None,
    readaheads: Sequence[int] = (USUAL_READAHEAD_KB,),
    budgets: Sequence[str] = (),
    quality_budgets: Sequence[str] = (),
) -> tuple[ArmRecord, ...]:
    """List all arms, those that cannot be run on this machine included, with the reason.

    Parameters
    ----------
    adapter : Adapter
        The engine.
    catalog : Catalog
        The model.
    limits : sequence of Limit
        Memory limits.
    options : mapping
        Expertier's options.
    ability : Ability
        What this machine allows.
    variants : mapping of str to mapping, optional
        Further Expertier arms: name to the options that differ.
    only : sequence of str, optional
        Keys of the arms to keep.
    readaheads : sequence of int
        KiB at which stock runs under a limit, besides the setting as found.
    budgets : sequence of str
        Budgets of further Expertier arms where nothing limits memory.
    quality_budgets : sequence of str
        Quality budgets of further Expertier arms.

    Raises
    ------
    UnsupportedOptionError
        `only` names an arm that does not exist, or one for which this machine lacks something.
    """
    arms: list[ArmRecord] = []
    _check_obstacles(adapter, catalog, limits, only or ())
    for limit in limits:
        stock = _stock_arms(adapter, catalog, limit, ability, readaheads)
        ours = [_our_arm(catalog, limit, options, ability)]
        further: list[tuple[str, str, dict[str, Any]]]
        further = [(budget, f"budget {budget}", {"budget": budget}) for budget in budgets if limit.limit_bytes is None]
        further += [
            (f"quality-{text}", _quality_label(text), {**_NO_STAND_INS, "quality_budget": text})
            for text in quality_budgets
        ]
        for key, name, changes in [*further, *((name, name, given) for name, given in (variants or {}).items())]:
            settings = {**ours[0].settings, **changes}
            label, lossy = f"Expertier, {name}", is_lossy(settings)
            ours.append(replace(ours[0], key=f"{_OURS}-{key}", label=label, settings=settings, lossy=lossy))
        arms += [_runnable(arm, limit, ability) for arm in (*stock, *ours)]
    if only is not None:
        unknown = set(only) - {arm.key for arm in arms}
        if unknown or not only:
            known = ", ".join(dict.fromkeys(arm.key for arm in arms))
            raise UnsupportedOptionError(
                f"There is no arm called {', '.join(sorted(unknown)) or repr('')}.", f"Arms are: {known}."
            )
        arms = [arm for arm in arms if arm.key in only]
    return tuple(arms)


def _check_obstacles(adapter: Adapter, catalog: Catalog, limits: Sequence[Limit], only: Sequence[str]) -> None:
    for limited in {limit.limit_bytes is not None for limit in limits}:
        for variant in adapter.stock_variants(catalog, limited=limited):
            if variant.obstacle and variant.key in only:
                raise UnsupportedOptionError(
                    f"The arm {variant.key} cannot be run here: {variant.obstacle}.", "Leave it out of --arms."
                )


def _stock_arms(
    adapter: Adapter, catalog: Catalog, limit: Limit, ability: Ability, readaheads: Sequence[int]
) -> list[ArmRecord]:
    limited = limit.limit_bytes is not None
    found = ability.readahead_kb if adapter.workloads.readahead else None
    arms = []
    possible = [each for each in adapter.stock_variants(catalog, limited=limited) if not each.obstacle]
    for index, variant in enumerate(possible):
        arm = ArmRecord(
            key=variant.key,
            label=variant.label,
            ours=False,
            limit=limit.text,
            limit_bytes=limit.limit_bytes,
            settings=variant.settings,
            readahead_kb=readaheads[0] if limited and found is not None else None,
        )
        arms.append(arm)
        if not limited or index or found is None:
            continue
        for other in readaheads[1:]:
            label = f"{variant.label}, readahead {other} KiB"
            arms.append(replace(arm, key=f"{variant.key}-readahead-{other}", label=label, readahead_kb=other))
        if found not in readaheads:
            label = f"{variant.label}, readahead {found} KiB as found"
            arms.append(replace(arm, key=f"{variant.key}-readahead", label=label, readahead_kb=None))
    return arms


def _our_arm(catalog: Catalog, limit: Limit, options: Mapping[str, Any], ability: Ability) -> ArmRecord:
    chosen = dict(options)
    if (
        limit.limit_bytes is None
        and chosen.get("budget") == "auto"
        and ability.memory_left > catalog.file_bytes * 11 // 10
    ):
        chosen["budget"] = "100%"  # nothing is scarce: what does the machinery itself cost?
    return ArmRecord(
        key=_OURS,
        label="Expertier",
        ours=True,
        limit=limit.text,
        limit_bytes=limit.limit_bytes,
        settings=chosen,
        lossy=is_lossy(chosen),
    )


def _quality_label(text: str) -> str:
    budget = parse_quality_budget(text)
    return {"exact": "exact", "bias": f"bias {text}", "perplexity": f"at most {text} perplexity"}[budget.kind]


def _runnable(arm: ArmRecord, limit: Limit, ability: Ability) -> ArmRecord:
    reason = ""
    if limit.limit_bytes is not None:
        if ability.confinement:
            reason = f"no memory limit can be enforced: {ability.confinement}"
        elif limit.limit_bytes > ability.memory_left:
            reason = f"only {format_bytes(ability.memory_left)} of memory are left"
    if not reason and arm.readahead_kb not in (None, ability.readahead_kb) and ability.readahead:
        reason = f"readahead cannot be set to {arm.readahead_kb} KiB: {ability.readahead}"
    return replace(arm, status="not run", reason=reason) if reason else arm
