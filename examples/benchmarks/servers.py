"""What benchmarks of servers share."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import psutil

_PATIENCE = 20  # seconds until what does not end is killed


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """At the end, end a process with all it started."""
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in everyone:
                with contextlib.suppress(psutil.Error):
                    one.terminate()
            for one in psutil.wait_procs(everyone, timeout=_PATIENCE)[1]:
                with contextlib.suppress(psutil.Error):
                    one.kill()
        process.wait()
