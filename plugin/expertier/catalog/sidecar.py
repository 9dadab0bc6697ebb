"""Where a model's sidecar file may lie, and how its writing is announced."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from expertier.errors import ExpertierError
from expertier.paths import cache_dir

logger = logging.getLogger("expertier")


def sidecar_directories(beside: Path, chosen: str | None) -> list[Path]:
    """Where sidecars are looked for and written, best place first.

    Parameters
    ----------
    beside : Path
        Directory of the model.
    chosen : str or None
        Option ``sidecar_dir``: the only place, if given.
    """
    if chosen:
        return [Path(chosen).expanduser().absolute()]
    directories = [beside.absolute()]
    try:
        directories.append(cache_dir() / "sidecars")
    except ExpertierError as error:  # only a second choice; the first may do
        logger.info("%s", error)
    return directories


@contextlib.contextmanager
def announced(text: str, size: int) -> Iterator[Callable[[int], None]]:
    """Tell on stderr that `size` bytes are being written, on a terminal with a progress bar.

    Yields
    ------
    callable
        To be told the bytes written since it was last told.
    """
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    console.print(text, markup=False, highlight=False)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=size)
        yield lambda count: progress.advance(task, count)
