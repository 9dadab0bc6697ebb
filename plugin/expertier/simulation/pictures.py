"""Pictures of a trace, and the page that shows them."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import IntArray
from expertier.simulation.analysis import Turn
from expertier.simulation.figure import BOUND, COLOURS, FAINT, INK, name_axes, style


def _new(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_heat_map(shares: NDArray[np.float64], layers: Sequence[int], path: Path) -> None:
    """Draw which experts every layer uses.

    Parameters
    ----------
    shares : ndarray, shape (layers, experts)
        Share of routes; a row sums to 1, ``nan`` where there is no expert.
    layers : sequence of int
        Indices of the layers.
    path : Path
        PNG file to write.
    """
    import matplotlib

    with matplotlib.rc_context({**style(), "axes.grid": False}):
        figure, axes = _new(11, min(max(2.4, 0.32 * len(layers) + 1.6), 14))
        times = np.sort(np.nan_to_num(shares), axis=1)[:, ::-1] * np.isfinite(shares).sum(axis=1, keepdims=True)
        image = axes.imshow(times, aspect="auto", cmap="magma", interpolation="nearest", vmin=0)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel("experts of a layer, most used first")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, label="times as often as with uniform routing")
        name_axes(axes, "Use of experts", "share of routes in decode steps, relative to uniform routing")
        _save(figure, path)


def draw_reuse(distances: IntArray, total: int, path: Path) -> None:
    """Draw how soon an expert is used again: the share of uses within n other experts.

    Parameters
    ----------
    distances : ndarray of int64
        See :func:`expertier.simulation.analysis.reuse_distances`.
    total : int
        Experts of the model.
    path : Path
        PNG file to write.
    """
    import matplotlib

    counts = np.bincount(distances, minlength=total + 1)[1 : total + 1]
    share = 100 * np.cumsum(counts) / max(len(distances), 1)
    with matplotlib.rc_context(style()):
        figure, axes = _new(7.5, 4.2)
        axes.plot(100 * np.arange(1, total + 1) / total, share, color=COLOURS[0], linewidth=2)
        axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", linewidth=1.4, label="experts kept at random")
        axes.set_xlabel("distinct experts used in between, % of all")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 101)
        axes.legend(frameon=False, loc="lower right")
        name_axes(axes, "Reuse distance", "% of uses whose expert was used at most so many other experts ago")
        _save(figure, path)


def draw_hits(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw hit ratio against budget.

    Parameters
    ----------
    curves : mapping of str to sequence of (float, float)
        Name to points of share resident and hit ratio; the one called ``belady`` is the bound.
    path : Path
        PNG file to write.
    """
    import matplotlib

    with matplotlib.rc_context(style()):
        figure, axes = _new(7.5, 4.2)
        for index, (name, points) in enumerate(curves.items()):
            bound = name == "belady"
            axes.plot(
                [100 * share for share, _ in points],
                [100 * hits for _, hits in points],
                color=BOUND if bound else COLOURS[index % len(COLOURS)],
                linestyle="--" if bound else "-",
                marker=".",
                linewidth=1.8,
                label="Belady (knows the future)" if bound else name,
            )
        axes.set_xlabel("% of experts resident")
        axes.set_ylim(top=101)
        axes.legend(frameon=False, loc="lower right")
        name_axes(axes, "Hit ratio", "% of needed experts that were resident; decode steps, one pool for all layers")
        _save(figure, path)


def draw_calibration(horizons: Mapping[str, NDArray[np.float64]], path: Path) -> None:
    """Draw whether a predictor's chances are true.

    Parameters
    ----------
    horizons : mapping of str to ndarray of float64, shape (bins, 3)
        By horizon what :func:`expertier.routing.evaluate.calibration` found.
    path : Path
        PNG file to write.
    """
    import matplotlib

    with matplotlib.rc_context(style()):
        figure, axes = _new(7.5, 4.6)
        axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", linewidth=1.4, label="true chances")
        for place, (name, bins) in enumerate(horizons.items()):
            some = bins[bins[:, 2] > 0]
            axes.plot(100 * some[:, 0], 100 * some[:, 1], color=COLOURS[place % len(COLOURS)], marker="o", label=name)
        axes.set_xlabel("chance that was given, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 101)
        axes.legend(frameon=False, loc="upper left")
        name_axes(axes, "Are chances true?", "% of the experts with about this chance that were used")
        _save(figure, path)


def draw_time_line(turns: Sequence[Turn], title: str, path: Path) -> None:
    """Draw loads against compute for a few tokens.

    Parameters
    ----------
    turns : sequence of Turn
        See :func:`expertier.simulation.analysis.time_line`.
    title : str
        What was replayed.
    path : Path
        PNG file to write.
    """
    import matplotlib

    tokens = sorted({turn.token for turn in turns})
    origin = {token: min(turn.start for turn in turns if turn.token == token) for token in tokens}
    with matplotlib.rc_context({**style(), "axes.grid": False}):
        figure, axes = _new(11, 1.4 + 0.55 * len(tokens))
        for turn in turns:
            start = 1e3 * (turn.start - origin[turn.token])
            wait, work = 1e3 * (turn.loaded - turn.start), 1e3 * (turn.end - turn.loaded)
            axes.barh(turn.token, wait, left=start, height=0.62, color=COLOURS[1])
            axes.barh(turn.token, work, left=start + wait, height=0.62, color=COLOURS[0], edgecolor="white", lw=0.3)
            if turn.loads:
                axes.text(
                    start + wait / 2, turn.token, str(turn.loads), ha="center", va="center", fontsize=7, color=INK
                )
        axes.set_yticks(tokens, [f"token {token + 1}" for token in tokens])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        name_axes(axes, "Loads against compute", f"{title}; amber: waiting for so many loads, green: computing a layer")
        _save(figure, path)


def write_page(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    tables: Mapping[str, Sequence[Sequence[str]]],
    pictures: Sequence[Path],
) -> None:
    """Write an HTML page that needs nothing else: pictures are inside it.

    Parameters
    ----------
    path : Path
        File to write.
    title : str
        Heading.
    facts : sequence of (str, str)
        Names and values.
    tables : mapping of str to sequence of rows
        Caption to rows, the first of which is the header.
    pictures : sequence of Path
        PNG files.
    """
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts)
    parts = [f"<h1>{html.escape(title)}</h1><table>{rows}</table>"]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">')
    for caption, table in tables.items():
        header, *body = table
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
        parts.append(f"<h2>{html.escape(caption)}</h2><table><tr>{head}</tr>{lines}</table>")
    path.write_text(_PAGE.format(title=html.escape(title), body="\n".join(parts)), encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22313f; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; height: auto; display: block; margin: 1.6rem 0; }}
table {{ border-collapse: collapse; font-size: 14px; }}
th, td {{ text-align: left; padding: .15rem 1.2rem .15rem 0; vertical-align: top; }}
th {{ font-weight: 600; color: #5d6d7e; }}
</style></head>
<body>
{body}
</body></html>
"""
