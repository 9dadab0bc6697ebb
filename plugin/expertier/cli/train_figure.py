"""The picture of a training: recall by layer, and whether chances are true."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expertier.routing.evaluate import BEFORE, SOON, Score
from expertier.simulation.figure import COLOURS, FAINT, name_axes, style

_CONTROLS = ("previous token", "static frequency")


def draw_scores(scores: Sequence[Score], path: Path) -> None:
    """Draw recall at k by layer before the first layer runs, and of the next token, for one text.

    Parameters
    ----------
    scores : sequence of Score
        The first text among them is drawn.
    path : Path
        PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    text = scores[0].text
    with matplotlib.rc_context(style()):
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
        for axes, horizon, title in zip(
            panels, (BEFORE, SOON[0]), ("This token, before layer 0", "The next token"), strict=True
        ):
            here = [item for item in scores if (item.text, item.horizon) == (text, horizon)]
            for place, item in enumerate(here):
                control = item.predictor in _CONTROLS
                values = [100 * value for value in item.recall[0]]
                axes.plot(
                    range(len(values)),
                    values,
                    label=item.predictor,
                    color=FAINT if control else COLOURS[place % len(COLOURS)],
                    linestyle=(":" if item.predictor == _CONTROLS[0] else "--") if control else "-",
                    marker="o",
                    markersize=3,
                )
            axes.set_ylim(0, 100)
            axes.set_xlabel("layer, by position")
            name_axes(axes, title, f"share of used experts among as many candidates, %, {text}")
        panels[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
