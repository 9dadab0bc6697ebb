"""Curves of a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertier.budget import format_bytes
from expertier.simulation.sweep import BELADY, ArmResult, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID, BOUND = "#22313f", "#8795a1", "#e4e9ed", "#d1495b"
COLOURS = ("#0f8b8d", "#edae49", "#5d6d7e", "#8e6fb5", "#c96f53", "#7a9e3f")


def style() -> Any:  # matplotlib types the keys one by one
    """Return the look of all pictures."""
    return {
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.facecolor": "white",
    }


def name_axes(axes: Axes, title: str, subtitle: str) -> None:
    """Put a title and a smaller line above a picture."""
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=20)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=FAINT, fontsize=8.5, va="bottom")


def draw_simulation(simulation: Simulation, path: Path) -> None:
    """Draw hit ratio, bytes and, where speeds are known, tokens per second against the budget.

    Parameters
    ----------
    simulation : Simulation
        What to draw.
    path : Path
        PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[ArmResult]] = {}
    for arm in simulation.arms:
        curves.setdefault(arm.label, []).append(arm)
    timed = simulation.timing is not None
    with pyplot.rc_context(style()):
        figure, axes = pyplot.subplots(
            1, 3 if timed else 2, figsize=(14.0 if timed else 9.6, 4.6), layout="constrained"
        )
        hits, volume = axes[0], axes[1]
        for index, (label, arms) in enumerate(curves.items()):
            look = _look(label, index)
            shares = [100 * arm.share for arm in arms]
            hits.plot(shares, [100 * arm.hit_ratio for arm in arms], label=label, **look)
            volume.plot(shares, [arm.bytes_per_token / 1e6 for arm in arms], **look)
            if timed:
                axes[2].plot(shares, [1 / _seconds(arm) for arm in arms], **look)
        name_axes(hits, "Hit ratio", "% of needed experts that were resident; decode steps")
        name_axes(volume, "Read per token", "MB")
        volume.set_ylim(bottom=0)
        if timed:
            _draw_bounds(axes[2], curves)
            name_axes(axes[2], "Decode", "steps per second; dotted: bounds")
            axes[2].set_ylim(bottom=0)
        for place in axes:
            place.set_xlabel("% of experts resident")
        figure.legend(*hits.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        figure.suptitle(
            f"{simulation.model}: {simulation.tokens} decoded tokens, experts {format_bytes(simulation.total_bytes)}",
            x=0.012,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _look(label: str, index: int) -> dict[str, Any]:
    if label == BELADY:
        return {"color": BOUND, "linestyle": "--", "marker": ".", "linewidth": 1.8}
    return {"color": COLOURS[index % len(COLOURS)], "marker": ".", "linewidth": 1.8}


def _seconds(arm: ArmResult) -> float:
    if arm.prefetch_seconds is not None:
        return arm.prefetch_seconds
    assert arm.seconds is not None
    return arm.seconds.demand


def _draw_bounds(axes: Axes, curves: dict[str, list[ArmResult]]) -> None:
    """Perfect one-layer prefetch of the first policy, its bandwidth, and what Belady's loads would allow."""
    first = next(iter(curves.values()))
    rows = ((first, "one_layer", COLOURS[0], "perfect one-layer prefetch"), (first, "bound", FAINT, "bandwidth"))
    for arms, attribute, colour, label in (*rows, (curves[BELADY], "bound", BOUND, "Belady and bandwidth")):
        values = [1 / getattr(arm.seconds, attribute) for arm in arms if arm.seconds is not None]
        shares = [100 * arm.share for arm in arms if arm.seconds is not None]
        axes.plot(shares, values, color=colour, linestyle=":", linewidth=1.6, label=label)
    axes.legend(loc="lower right", frameon=False, fontsize=8.5)
