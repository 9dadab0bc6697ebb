"""The figure of a comparison: decode speed, time to the first token, and memory against its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertier.budget import format_bytes
from expertier.comparison.loads import LoadSummary, speed_with
from expertier.comparison.ratios import Ratio
from expertier.comparison.records import ArmRecord, Comparison, Figures
from expertier.comparison.summary import ArmSummary, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT = "#22313f", "#8795a1"
_OURS = ("#0f8b8d", "#3fb6a8", "#7fd1c2", "#b5e4db")
_OURS_MANY = ("#0b3c49", "#0f6e78", "#0f8b8d", "#3fb6a8", "#7fd1c2", "#a9d18e", "#d9c76a", "#e8a95b")  # of an ablation
_STOCK = ("#98a6b3", "#bcc6cf", "#d7dde3", "#e7ebef")
_BOUNDS = ("#c9a227", "#e07a5f", "#8e6c8a", "#5c677d")
_GIB = 1 << 30
_LINES = ("o-", "s--", "^:", "v-.")


def draw(comparison: Comparison, summary: Summary, path: Path) -> None:
    """Draw a comparison into a PNG file.

    Parameters
    ----------
    comparison, summary : Comparison, Summary
        What to draw.
    path : Path
        Where to.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    limits = list(dict.fromkeys(arm.limit for arm in summary.arms))
    labels = list(dict.fromkeys(arm.label for arm in summary.arms))
    colours = _colours(summary, labels)
    with pyplot.rc_context(_style()):
        counts = sorted({load.requests for arm in summary.arms for load in arm.loads if load.requests > 1})[:3]
        lossy = [arm for arm in summary.arms if arm.quality is not None]
        rows = 1 + bool(counts) + bool(lossy)
        figure, grid = pyplot.subplots(
            rows,
            3,
            figsize=(max(11.0, 3.2 * len(limits) + 3.5), 4.6 * rows - 0.6 * (rows - 1)),
            width_ratios=(1.5, 1, 1),
            layout="constrained",
            squeeze=False,
        )
        axes = grid[0]
        bars = _Bars(comparison, summary, limits, labels, colours)
        bars.draw(axes[0], lambda arm: arm.tokens_per_second, lambda figures: figures.tokens_per_second)
        bars.draw_bounds(axes[0])
        _name(axes[0], "Decode", "tokens per second, higher is better")
        bars.label(axes[0], lambda arm: arm.against_stock, lambda arm: arm.tokens_per_second_high or 0.0)
        bars.draw(axes[1], lambda arm: arm.ttft_long_seconds, lambda figures: figures.ttft_long_seconds)
        _name(axes[1], "First token", f"seconds for a {comparison.settings.long_prompt}-token prompt, lower is better")
        bars.draw(axes[2], lambda arm: _gib(arm.peak_memory_bytes or arm.peak_rss_bytes), None)
        bars.draw_limits(axes[2])
        _name(axes[2], "Peak memory", "GiB, page cache included; the line is the limit")
        for place, count in enumerate(counts):
            _draw_load(bars, grid[1][place], count)
        free = list(grid[1, len(counts) :].flat) if counts else []
        if free:
            memory = free.pop(0)
            bars.draw(memory, lambda arm: _gib(arm.peak_rss_bytes), None)
            _name(memory, "Peak memory of the worker", "GiB resident in the largest process")
        if lossy:
            _name(grid[-1][0], "What lossy arms lose", "% of perplexity and its interval, against tokens per second")
            draw_quality(grid[-1][0], lossy, colours)
            draw_substitution(grid[-1][1], lossy, colours)
            _name(grid[-1][1], "Stand-ins", "% of a token's gate mass, by layer")
            free.append(grid[-1][2])
        for unused in free:
            unused.set_axis_off()
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
        model = comparison.model
        figure.suptitle(
            f"{model.name}: {format_bytes(model.file_bytes)}, {model.layers} layers x {model.experts} experts",
            x=0.012,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def draw_quality(axes: Axes, arms: Sequence[ArmSummary], colours: dict[str, str]) -> None:
    """Draw what lossy arms lose against their speed, with the interval over texts."""
    for arm in arms:
        assert arm.quality is not None
        low, middle, high = (100 * getattr(arm.quality.increase, name) for name in ("low", "middle", "high"))
        error = [[middle - low], [high - middle]] if math.isfinite(high - low) else None
        axes.errorbar(
            arm.tokens_per_second or 0.0, middle, error, fmt="o", color=colours[arm.label], capsize=3, label=arm.label
        )
        axes.annotate(
            arm.limit, (arm.tokens_per_second or 0.0, middle), xytext=(6, 4), textcoords="offset points", fontsize=8
        )
    axes.axhline(0, color=_FAINT, linewidth=0.8)
    found = [arm.quality.increase for arm in arms if arm.quality is not None]
    ends = [100 * end for each in found for end in (each.low, each.middle, each.high) if math.isfinite(end)]
    axes.set_ylim(1.2 * min(0.0, *ends) - 0.1, 1.2 * max(0.0, *ends) + 0.1)
    axes.margins(x=0.15)


def draw_substitution(axes: Axes, arms: Sequence[ArmSummary], colours: dict[str, str]) -> None:
    """Draw the share of gate mass that stand-ins took, by layer."""
    for place, arm in enumerate(arms):
        share = [100 * value for value in arm.substituted]
        axes.plot(range(len(share)), share, _LINES[place % len(_LINES)], color=colours[arm.label], markersize=4)
    axes.set_xlabel("layer")


def _draw_load(bars: _Bars, axes: Axes, count: int) -> None:
    def load(arm: ArmSummary) -> LoadSummary | None:
        return next((item for item in arm.loads if item.requests == count), None)

    bars.draw(axes, lambda arm: getattr(load(arm), "tokens_per_second", None), speed_with(count))
    _name(axes, f"{count} requests at a time", "tokens per second of all together, prompts included")
    bars.label(axes, lambda arm: getattr(load(arm), "against_stock", None), lambda arm: _highest(load(arm)))


def _highest(load: LoadSummary | None) -> float:
    return 0.0 if load is None else load.tokens_per_second_high


def _style() -> Any:  # matplotlib types the keys one by one
    return {
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "#e4e9ed",
        "xtick.color": _INK,
        "ytick.color": _FAINT,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "figure.facecolor": "white",
    }


def _colours(summary: Summary, labels: Sequence[str]) -> dict[str, str]:
    ours = {arm.label for arm in summary.arms if arm.ours}
    mine = [label for label in labels if label in ours]
    theirs = [label for label in labels if label not in ours]
    shades = _OURS if len(mine) <= len(_OURS) else _OURS_MANY
    return {
        **{label: shades[min(index, len(shades) - 1)] for index, label in enumerate(mine)},
        **{label: _STOCK[min(index, len(_STOCK) - 1)] for index, label in enumerate(theirs)},
    }


def _gib(amount: int | None) -> float | None:
    return None if amount is None else amount / _GIB


def _name(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=20)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=_FAINT, fontsize=8.5, va="bottom")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.14)


class _Bars:
    """Grouped bars: a group per limit, a bar per arm, a dot per repeat."""

    def __init__(
        self,
        comparison: Comparison,
        summary: Summary,
        limits: Sequence[str],
        labels: Sequence[str],
        colours: dict[str, str],
    ) -> None:
        self._arms: dict[tuple[str, str], tuple[ArmRecord, ArmSummary]] = {
            (arm.limit, arm.label): (arm, short) for arm, short in zip(comparison.arms, summary.arms, strict=True)
        }
        self._bounds = comparison.bounds
        self._limits = limits
        self._labels = labels
        self._colours = colours
        # Only arms that exist under a limit take room there.
        self._places: dict[tuple[str, str], float] = {}
        self._width = 0.8 / max(sum((limit, label) in self._arms for label in labels) for limit in limits)
        for centre, limit in enumerate(limits):
            present = [label for label in labels if (limit, label) in self._arms]
            for index, label in enumerate(present):
                self._places[limit, label] = centre + (index - (len(present) - 1) / 2) * self._width

    def draw(
        self,
        axes: Axes,
        height: Callable[[ArmSummary], float | None],
        raw: Callable[[Figures], float] | None,
    ) -> None:
        for label in self._labels:
            keys = [key for key in self._places if key[1] == label]
            heights = [height(self._arms[key][1]) or 0 for key in keys]
            places = [self._places[key] for key in keys]
            axes.bar(places, heights, self._width * 0.92, color=self._colours[label], label=label, zorder=2)
            for key, value in zip(keys, heights, strict=True):
                self._decorate(axes, key, value, raw)
        axes.set_xticks(range(len(self._limits)), [self._limit_name(limit) for limit in self._limits])
        axes.set_xlim(-0.55, len(self._limits) - 0.45)

    def _decorate(
        self, axes: Axes, key: tuple[str, str], height: float, raw: Callable[[Figures], float] | None
    ) -> None:
        """Say why there is no bar; put a dot per repeat on those there are."""
        arm, short = self._arms[key]
        place = self._places[key]
        if not short.runs and not height:
            where = axes.get_xaxis_transform()  # x in data, y as a share of the axis
            axes.text(
                place,
                0.02,
                short.status,
                transform=where,
                rotation=90,
                ha="center",
                va="bottom",
                color=_FAINT,
                fontsize=8,
            )
        values = [raw(run.figures) for run in arm.runs if raw is not None and run.figures is not None]
        if len(values) > 1:
            axes.plot([place] * len(values), values, ".", color=_INK, markersize=3.5, alpha=0.55, zorder=3)

    def label(
        self, axes: Axes, against_stock: Callable[[ArmSummary], Ratio | None], top: Callable[[ArmSummary], float]
    ) -> None:
        """Write the ratio to stock above Expertier's bars."""
        from matplotlib import patheffects

        for key, (_, short) in self._arms.items():
            ratio = against_stock(short)
            if not short.ours or ratio is None:
                continue
            axes.annotate(
                f"{ratio.median:.2f}x",
                (self._places[key], top(short)),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=10 if len(self._labels) <= 6 else 7.5,
                fontweight="bold",
                color=self._colours[key[1]],
                path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],  # a neighbour may be taller
            )

    def draw_bounds(self, axes: Axes) -> None:
        """A dashed line for each bound, across the bars of its limit."""
        labels = list(dict.fromkeys(bound.label for bound in self._bounds))
        for index, label in enumerate(labels):
            drawn = [(self._limits.index(b.limit), b.tokens_per_second) for b in self._bounds if b.label == label]
            axes.hlines(
                [height for _, height in drawn],
                [centre - 0.42 for centre, _ in drawn],
                [centre + 0.42 for centre, _ in drawn],
                colors=_BOUNDS[index % len(_BOUNDS)],
                linestyles="dashed",
                linewidth=1.2,
                label=f"bound: {label}",
                zorder=4,
            )

    def draw_limits(self, axes: Axes) -> None:
        for centre, limit in enumerate(self._limits):
            amount = next(arm.limit_bytes for (name, _), (arm, _) in self._arms.items() if name == limit)
            if amount is not None:
                axes.hlines(amount / _GIB, centre - 0.45, centre + 0.45, color="#d1495b", linewidth=1.6, zorder=4)

    def _limit_name(self, limit: str) -> str:
        amount = next(arm.limit_bytes for (name, _), (arm, _) in self._arms.items() if name == limit)
        if amount is None:
            return "no limit"
        size = format_bytes(amount).replace(".00 ", " ")
        return f"{size}\n({limit})" if limit.endswith("%") else size
