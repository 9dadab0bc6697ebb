"""Where Expertier keeps files of its own."""

from __future__ import annotations

import os
from pathlib import Path

from expertier.errors import ExpertierError

CACHE_VARIABLE = "EXPERTIER_CACHE"


def cache_dir() -> Path:
    """Directory for everything that can be made again: sidecars, profiles, traces.

    ``EXPERTIER_CACHE`` if it is set, else ``expertier`` under ``XDG_CACHE_HOME``, else ``~/.cache/expertier``.

    Returns
    -------
    Path
        An absolute path to an existing, writable directory.

    Raises
    ------
    ExpertierError
        The directory cannot be created or written to.
    """
    remedy = f"Set {CACHE_VARIABLE} to a directory that can be written to."
    own = os.environ.get(CACHE_VARIABLE, "")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if own:
            path = Path(own).expanduser().absolute()
        elif os.path.isabs(shared):  # the XDG rules: a relative path is to be ignored
            path = Path(shared) / "expertier"
        else:
            path = Path.home() / ".cache" / "expertier"
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExpertierError(f"The cache directory cannot be created: {reason}.", remedy) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ExpertierError(f"The cache directory {path} cannot be written to.", remedy)
    return path
