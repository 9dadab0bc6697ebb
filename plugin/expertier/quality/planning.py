"""What a quality budget gives at any memory budget, for the planner."""

from __future__ import annotations

from dataclasses import dataclass

from expertier.catalog.types import Catalog
from expertier.config import OffloadOptions
from expertier.errors import QualityBudgetError
from expertier.planning.planner import QualitySetting
from expertier.quality.budget import QualityBudget, resolve
from expertier.quality.profile import QualityProfile
from expertier.quality.serving import read_quality_budget


@dataclass(frozen=True, kw_only=True)
class BudgetedQuality:
    """Fulfils :class:`expertier.planning.planner.QualityCurves` for one quality budget.

    Attributes
    ----------
    budget : QualityBudget
        A percentage of perplexity.
    profile : QualityProfile
        Of the model.
    """

    budget: QualityBudget
    profile: QualityProfile

    def settings(self, share: float) -> tuple[QualitySetting, ...]:
        """What serving would use at a share; nothing where the profile has not measured so little memory."""
        try:
            found = resolve(self.budget, self.profile, share)
        except QualityBudgetError:
            return ()
        if not found.exact_loads_per_token:
            return ()
        return (
            QualitySetting(
                bias=found.bias,
                protect=found.protect,
                loads_ratio=found.loads_per_token / found.exact_loads_per_token,
                perplexity_rise=found.increase,
            ),
        )


def plan_quality(options: OffloadOptions, catalog: Catalog) -> BudgetedQuality | None:
    """What the options allow, if that is a percentage.

    Raises
    ------
    QualityBudgetError, QualityProfileError
        As when serving with these options.
    """
    _, keeper = read_quality_budget(options, catalog)
    return None if keeper is None else BudgetedQuality(budget=keeper.budget, profile=keeper.profile)
