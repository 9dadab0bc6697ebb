"""The folder that a command writes its results into."""

from __future__ import annotations

import datetime
from pathlib import Path

from expertier.errors import ExpertierError
from expertier.paths import cache_dir


def prepare_folder(out: Path | None, kind: str, record: str) -> Path:
    """Make the folder for results.

    Parameters
    ----------
    out : Path or None
        ``None`` makes a new one under `kind` in the cache directory.
    kind : str
        What results these are, e.g. ``comparisons``.
    record : str
        Name of the file that will be written there.

    Raises
    ------
    ExpertierError
        It cannot be written to.
    """
    if out is None:
        out = cache_dir() / kind / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = (out / record).with_suffix(".tmp")
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ExpertierError(
            f"The directory {out} cannot be written to: {error.strerror}.", "Choose another --out."
        ) from error
    return out
