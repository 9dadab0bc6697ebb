"""``expertier train``: route predictors from recorded routes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from expertier.catalog import read_catalog
from expertier.catalog.routers import read_embedding, read_norms, read_routers, routers_digest
from expertier.cli.folder import prepare_folder
from expertier.cli.options import print_json, write_json
from expertier.cli.train_figure import draw_scores
from expertier.errors import TraceMismatchError, UnsupportedEngineError, UnsupportedOptionError
from expertier.routing import read_trace
from expertier.routing.evaluate import Score
from expertier.routing.lookahead import Lookahead
from expertier.routing.predictor import RoutedModel
from expertier.routing.saved import MANIFEST, Trained, save
from expertier.routing.train import Progress as Tell
from expertier.routing.train import TrainSettings, report, train
from expertier.routing.windows import Windows, read_windows

REPORT = "report.json"
FIGURE = "report.png"
KEPT_BACK = "kept back"
HELD_OUT = "domains held out"
_DOING = {
    "count": "counting",
    "path": "training the path network",
    "blend": "fitting the mixture",
    "report": "scoring",
}


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What the user asked for; see the flags of the command."""

    traces: tuple[Path, ...]
    tests: tuple[Path, ...]
    hold_out: tuple[str, ...]
    out: Path
    model: Path | None
    report: bool
    settings: TrainSettings
    partial: bool
    report_tokens: int
    as_json: bool


def train_command(request: TrainRequest) -> None:
    """Train, save and, if asked, report."""
    if not request.traces:
        raise UnsupportedOptionError("There is no trace to train on.", "Record one with `expertier profile`.")
    windows, tokens = read_windows([read_trace(path, partial=request.partial) for path in request.traces])
    tests = [_test(path, windows, request) for path in request.tests]
    embedding, lookahead, windows = _look_at_model(request.model, windows)
    if request.hold_out:
        windows, others = windows.apart(request.hold_out)
        tests = [(HELD_OUT, others), *tests]
    prepare_folder(request.out, "predictors", MANIFEST)
    if not tokens:
        print(
            "The traces have no token ids, so only routes can be learnt from: record with --trace-tokens on.",
            file=sys.stderr,
        )
    scores: list[Score] = []
    with _progress() as tell:
        try:
            trained, kept_back = train(
                windows,
                tokens=tokens,
                settings=request.settings,
                embedding=embedding,
                lookahead=lookahead,
                progress=tell,
            )
            save(request.out, trained)
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "safetensors"):
                raise
            raise UnsupportedEngineError(
                "Training needs torch, which is not installed.", "Install Expertier with its extra: expertier[train]."
            ) from error
        if request.report or tests:
            texts = [(KEPT_BACK, kept_back), *tests]
            scores = report(trained, texts, most_tokens=request.report_tokens, lookahead=lookahead, progress=tell)
    if scores:
        write_json(request.out / REPORT, {"model": trained.model, "facts": trained.facts, "scores": scores})
        draw_scores(scores, request.out / FIGURE)
    if request.as_json:
        print_json({"out": str(request.out), "predictors": trained.names, "facts": trained.facts, "scores": scores})
        return
    _print(request, trained, scores)


def _test(path: Path, windows: Windows, request: TrainRequest) -> tuple[str, Windows]:
    found, _ = read_windows([read_trace(path, partial=request.partial)])
    if not windows.model.same_routes(found.model):
        raise TraceMismatchError(
            f"{path} is a trace of {found.model.name}, the others are of {windows.model.name}.",
            "Test on traces of the model that is trained for.",
        )
    return path.stem, found


def _look_at_model(path: Path | None, windows: Windows) -> tuple[NDArray[np.float32] | None, Lookahead | None, Windows]:
    """Return the model's token embedding and lookahead, and the windows with its identity."""
    if path is None:
        return None, None, windows
    catalog = read_catalog(path)
    gates = read_routers(catalog)
    model = RoutedModel.of_catalog(catalog, routers_digest(gates, tuple(catalog.by_layer)))
    if not model.same_routes(windows.model):
        raise TraceMismatchError(
            f"The traces are of {windows.model.name}, not of {model.name}.",
            "Name the model they were recorded with, or record traces of this one.",
        )
    lookahead = None
    if model.routers:
        lookahead = Lookahead(
            gates=gates, norms=read_norms(catalog), top_k=dict(zip(model.layers, model.top_k, strict=True))
        )
    return read_embedding(catalog), lookahead, replace(windows, model=model)


def _print(request: TrainRequest, trained: Trained, scores: list[Score]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(f"{request.out}: {', '.join(trained.names)}, learnt from {trained.facts['tokens']} tokens")
    for text in dict.fromkeys(item.text for item in scores):
        here = [item for item in scores if item.text == text]
        table = Table(title=f"{text}: {max(item.tokens for item in here)} tokens, one by one", title_justify="left")
        widths = here[0].candidates
        table.add_column("predictor", no_wrap=True)
        table.add_column("horizon", no_wrap=True)
        for width in widths:
            table.add_column(f"recall@{width:g}k", justify="right")
            table.add_column("prec.", justify="right")
        table.add_column("calib. error", justify="right")
        table.add_column(f"recall@{widths[0]:g}k by layer")
        for item in here:
            cells = [item.predictor, item.horizon]
            for width in widths:
                cells += [f"{item.mean_recall(width):.3f}", f"{item.mean_precision(width):.3f}"]
            by_layer = " ".join("-" if np.isnan(value) else f"{value:.2f}"[1:] for value in item.recall[0])
            table.add_row(*cells, f"{item.calibration_error:.3f}", by_layer)
        console.print(table)
    if scores:
        console.print(f"[dim]Record: {request.out / REPORT}   Figure: {request.out / FIGURE}[/]")
    else:
        console.print("[dim]How good they are: --report[/]")


@contextmanager
def _progress() -> Iterator[Tell]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, share, words: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[words]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, object] = {}
        shown = 0.0

        def tell(what: str, share: float, words: str) -> None:
            nonlocal shown
            if what not in tasks:
                tasks[what] = progress.add_task(_DOING[what], total=1.0, words="")
            now = time.perf_counter()
            if words or share >= 1.0 or now - shown > 0.2:
                shown = now
                fields = {"words": words} if words else {}
                progress.update(tasks[what], completed=share, **fields)  # type: ignore[arg-type]

        yield tell
