"""The trade-off between memory, speed and perplexity as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expertier.budget import format_bytes
from expertier.planning.planner import PlannedBudget, TradeOff
from expertier.simulation.figure import BOUND, COLOURS, FAINT, name_axes, style

_EXACT, _CHOSEN, _LOSSY = COLOURS[0], COLOURS[1], BOUND


def draw_trade_off(found: TradeOff, title: str, path: Path) -> None:
    """Draw speed (or, without speeds, loads per token), hit ratio and perplexity against the budget.

    Parameters
    ----------
    found : TradeOff
        What to draw.
    title : str
        Name of the model.
    path : Path
        PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    lossy = any(point.setting.bias for point in found.curve)
    timed = found.chosen.tokens_per_second is not None

    def main_value(point: PlannedBudget) -> float:
        return point.loads_per_token if point.tokens_per_second is None else point.tokens_per_second

    def line(axes: Axes, points: Sequence[PlannedBudget], values: list[float], colour: str, label: str) -> None:
        axes.plot([point.budget_bytes / 2**20 for point in points], values, color=colour, linewidth=1.8, label=label)

    with pyplot.rc_context(style()):
        figure, axes = pyplot.subplots(
            1, 3 if lossy else 2, figsize=(13.2 if lossy else 9.2, 4.4), layout="constrained"
        )
        first, second = axes[0], axes[1]
        line(first, found.exact_curve, [main_value(point) for point in found.exact_curve], _EXACT, "exact")
        line(second, found.exact_curve, [100 * point.hit_ratio for point in found.exact_curve], _EXACT, "exact")
        if lossy:
            line(first, found.curve, [main_value(point) for point in found.curve], _LOSSY, "within the quality budget")
            line(second, found.curve, [100 * point.hit_ratio for point in found.curve], _LOSSY, "")
            line(axes[2], found.curve, [100 * point.setting.perplexity_rise for point in found.curve], _LOSSY, "")
            name_axes(axes[2], "Perplexity", "% above exact")
        name_axes(first, "Decode" if timed else "Loads", "tokens per second" if timed else "per token")
        name_axes(second, "Hit ratio", "% of needed experts that are resident")
        chosen = found.chosen.budget_bytes / 2**20
        first.plot(chosen, main_value(found.chosen), "o", color=_CHOSEN, markersize=8, label="asked for")
        for place in axes:
            place.set_xlabel("memory for experts, MiB")
            place.axvline(chosen, color=_CHOSEN, linewidth=1)
            if found.largest_bytes < found.curve[-1].budget_bytes:
                place.axvspan(found.largest_bytes / 2**20, found.curve[-1].budget_bytes / 2**20, color=FAINT, alpha=0.2)
            place.set_ylim(bottom=0)
        first.legend(frameon=False, fontsize=8.5)
        figure.suptitle(
            f"{title}: experts {format_bytes(found.curve[-1].budget_bytes)}; grey: more than memory leaves",
            x=0.012, ha="left", fontsize=12, fontweight="bold",
        )  # fmt: skip
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
