"""A progress bar for many prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from expertier_llamacpp.batch.requests import Output


class Bar:
    """Counts finished prompts and output tokens; draws nothing without a display."""

    def __init__(self, display: Progress | None, total: int | None) -> None:
        self._display = display
        self._tokens = 0
        self._task = display.add_task("prompts", total=total, tokens=0) if display is not None else None

    def note(self, output: Output) -> None:
        """Take note of an output."""
        if self._display is None or self._task is None or output.finish_reason is None:
            return
        self._tokens += len(output.tokens)
        self._display.update(self._task, advance=1, tokens=self._tokens)


@contextlib.contextmanager
def progress_bar(total: int | None, *, shown: bool) -> Iterator[Bar]:
    """Draw a bar on standard error while the block runs; `total` is ``None`` where nobody knows it."""
    if not shown:
        yield Bar(None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        yield Bar(display, total)
