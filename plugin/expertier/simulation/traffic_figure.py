"""Bars of scheduling arms."""

from __future__ import annotations

from pathlib import Path

from expertier.scheduling import CONTROL
from expertier.simulation.figure import COLOURS, FAINT, INK, name_axes, style
from expertier.simulation.scheduling import TrafficRecord

_PANELS = (
    ("loads_per_token", "Loads per token", "experts loaded per token of output; lower is better"),
    ("tokens_per_second", "Throughput", "tokens of output a second; higher is better"),
    ("first_token_p99", "Time to first token, p99", "lower is better"),
)


def draw_traffic(record: TrafficRecord, path: Path) -> None:
    """Draw what each arm loads, takes and delays, against first come, first served.

    Parameters
    ----------
    record : TrafficRecord
        What to draw.
    path : Path
        PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches, arms = record.batches(), [arm for arm in record.arms() if arm != CONTROL]
    width = 0.8 / max(1, len(arms))
    with pyplot.rc_context(style()):
        figure, panels = pyplot.subplots(1, len(_PANELS), figsize=(13.0, 4.2), layout="constrained")
        for axes, (name, title, subtitle) in zip(panels, _PANELS, strict=True):
            for index, arm in enumerate(arms):
                places = [place - 0.4 + (index + 0.5) * width for place in range(len(batches))]
                found = [record.ratio(batch, arm, name) for batch in batches]
                changes = [100 * (middle - 1) for middle, _, _ in found]
                spread = [
                    [100 * (middle - least) for middle, least, _ in found],
                    [100 * (most - middle) for middle, _, most in found],
                ]
                axes.bar(places, changes, width * 0.92, label=arm, color=COLOURS[index % len(COLOURS)])
                axes.errorbar(places, changes, spread, fmt="none", ecolor=FAINT, elinewidth=1, capsize=2)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
            axes.grid(visible=False, axis="x")
            name_axes(axes, title, f"% against {CONTROL}, {subtitle}")
        panels[0].legend(frameon=False, fontsize=8.5)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
