"""What may be lost: ``exact``, ``1%`` of perplexity, or a bias, and what that means at a memory budget."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from expertier.errors import QualityBudgetError
from expertier.quality.profile import Point, QualityProfile
from expertier.quality.statistics import Interval

_NUMBER: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})[ \t]*(%?)")
_REMEDY: Final = "Write exact, a percentage of perplexity such as 1%, or a bias such as 0.2."
_SAME_SHARE = 0.005  # a budget in bytes is never exactly the share that was measured


@dataclass(frozen=True, kw_only=True)
class QualityBudget:
    """What the user allows.

    Attributes
    ----------
    kind : {"exact", "perplexity", "bias"}
        What was stated.
    value : float
        Relative increase of the perplexity, or the bias.
    """

    kind: Literal["exact", "perplexity", "bias"] = "exact"
    value: float = 0.0

    def __str__(self) -> str:
        if self.kind == "perplexity":
            return f"{100 * self.value:g}%"
        return f"{self.value:g}" if self.kind == "bias" else "exact"


def parse_quality_budget(given: str | float | None) -> QualityBudget:
    """Read a quality budget.

    Parameters
    ----------
    given : str, float or None
        ``exact`` (or 0, or ``None``), a percentage, or a number above zero: a bias.

    Raises
    ------
    QualityBudgetError
        It is none of these.
    """
    text = "exact" if given is None else str(given).strip().lower()
    if text == "exact":
        return QualityBudget()
    match = _NUMBER.fullmatch(text)
    if match is None or isinstance(given, bool):
        raise QualityBudgetError(f"The quality budget {given!r} cannot be read.", _REMEDY)
    number = float(match[1])
    if not match[2]:
        return QualityBudget(kind="bias", value=number) if number else QualityBudget()
    if number > 100:
        raise QualityBudgetError(f"A quality budget of {text} more perplexity is no quality.", "Write at most 100%.")
    return QualityBudget(kind="perplexity", value=number / 100) if number else QualityBudget()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a quality budget means at a memory budget.

    Attributes
    ----------
    bias : float
        Share of a token's gate weight that residency is worth.
    protect : int
        First experts of a token that are never replaced.
    loads_per_token, increase : float
        What was measured there, interpolated: loads, and the expected relative increase of the perplexity.
    exact_loads_per_token : float
        At bias 0 with the same memory.
    """

    bias: float
    protect: int
    loads_per_token: float
    increase: float = 0.0
    exact_loads_per_token: float = 0.0


def resolve(budget: QualityBudget, profile: QualityProfile, share: float) -> Setting:
    """Find the setting with the fewest loads whose increase of the perplexity stays within the budget at 95 %.

    Parameters
    ----------
    budget : QualityBudget
        A percentage of perplexity.
    profile : QualityProfile
        What was measured.
    share : float
        Part of all experts that the memory budget holds.

    Raises
    ------
    QualityBudgetError
        Nothing was measured with as little memory.

    Notes
    -----
    Between two biases the upper bound is interpolated on a straight line, and never falls with the bias. Between two
    memory budgets the stricter one decides.
    """
    shares = profile.shares
    around = [max((known for known in shares if known <= share + _SAME_SHARE), default=None)]
    if around[0] is None:
        raise QualityBudgetError(
            f"The quality profile begins at {100 * shares[0]:.0f} % of the experts resident, the memory budget holds "
            f"{100 * share:.0f} %.",
            f"Raise the budget, or measure there: {profile.command(share)}.",
        )
    above = min((known for known in shares if known >= share - _SAME_SHARE), default=None)
    if above is not None and above != around[0]:
        around.append(above)
    found: list[Setting] = []
    for protect in profile.protects:
        curves = [profile.curve(known, protect) for known in around if known is not None]
        if not all(curves):
            continue
        bias = min(_largest_bias(curve, budget.value) for curve in curves)
        biases = [point.bias for point in curves[0]]
        loads = [point.loads_per_token for point in curves[0]]
        increases = [max(0.0, point.increase.middle) for point in curves[0]]
        found.append(
            Setting(
                bias=bias,
                protect=protect,
                loads_per_token=float(np.interp(bias, biases, loads)),
                increase=float(np.interp(bias, biases, increases)),
                exact_loads_per_token=loads[0],
            )
        )
    return min(found, key=lambda setting: (setting.loads_per_token, setting.bias))


def _largest_bias(curve: tuple[Point, ...], limit: float) -> float:
    """Of a curve that begins at bias 0."""
    biases = np.array([point.bias for point in curve])
    bounds = np.maximum.accumulate([max(0.0, point.increase.high) for point in curve])
    beyond = int(np.searchsorted(bounds, limit, side="right"))  # the first point that costs more
    if beyond == len(curve):
        return float(biases[-1])
    low, high = bounds[beyond - 1], bounds[beyond]
    if not math.isfinite(high):
        return float(biases[beyond - 1])
    return float(biases[beyond - 1] + (biases[beyond] - biases[beyond - 1]) * (limit - low) / (high - low))


def check_hard(budget: QualityBudget, profile: QualityProfile, share: float) -> Interval:
    """Refuse a percentage that choosing among resident experts only does not keep.

    Returns
    -------
    Interval
        The increase of the perplexity that was measured in hard mode.

    Raises
    ------
    QualityBudgetError
        It costs more, or was not measured.
    """
    measured = {point.share: point.increase for point in profile.points if point.hard}
    within = [known for known, increase in measured.items() if increase.high <= budget.value]
    known = max((known for known in measured if known <= share + _SAME_SHARE), default=None)
    if known is None:
        raise QualityBudgetError(
            f"The quality profile says nothing about hard mode at {100 * share:.0f} % of the experts resident.",
            f"Measure it: {profile.command(share)} --hard.",
        )
    if measured[known].high > budget.value:
        more = f"Give at least {100 * min(within):.0f}% of the experts, or leave" if within else "Leave"
        raise QualityBudgetError(
            f"In hard mode {100 * share:.0f} % of the experts cost up to {100 * measured[known].high:.1f} % more "
            f"perplexity, allowed are {100 * budget.value:g} %.",
            f"{more} hard mode: stand-ins by a bias cost less.",
        )
    return measured[known]
