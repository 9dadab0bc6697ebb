"""Where workers put what they count, so that the process that answers ``/metrics`` can read it without asking.

vLLM's scrape handler cannot wait for an answer of the engine, and an engine that computes a long prompt would not give
one for seconds. So every worker writes its record into a small file, at most once a second and only when something
changed, and a scrape reads the files. They lie in memory (``/dev/shm``) where that exists, in a directory that only
this user can read, and go with the worker.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from expertier.telemetry.metrics import Record, read_stats
from expertier_vllm.metrics import log_line

_SHARED_MEMORY: Final = Path("/dev/shm")
_WRITE_SECONDS: Final = 1.0
_LOG_INTERVAL: Final = "VLLM_LOG_STATS_INTERVAL"  # upstream: vllm.envs, seconds between two of vLLM's own lines
_LOG_SECONDS: Final = 10.0
_STALE_SECONDS: Final = 60.0

# vLLM's handlers and format belong to the logger called vllm.
_logger = logging.getLogger("vllm.expertier")


class Board:
    """The records of one server's workers.

    Parameters
    ----------
    instance : str
        What tells this server from others of the same user (upstream: ``VllmConfig.instance_id``, the same in all of a
        server's processes).
    root : Path, optional
        Where the directory is made.
    """

    def __init__(self, instance: str, root: Path | None = None) -> None:
        if root is None:
            root = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self.directory = root / f"expertier-{os.getuid()}-{instance}"

    def write(self, record: Record) -> None:
        """Replace the record of one worker; a reader sees the old one or the new one.

        Raises
        ------
        OSError
            It cannot be written.
        """
        self.directory.mkdir(mode=0o700, exist_ok=True)
        if self.directory.lstat().st_uid != os.getuid():
            raise PermissionError(f"{self.directory} belongs to somebody else")
        path = self._path(int(record["rank"]))
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({**record, "pid": os.getpid()}), encoding="utf-8")
        partial.replace(path)

    def read(self) -> list[Record]:
        """Return the records of all workers that are alive, by rank."""
        records = []
        for path in self.directory.glob("*.json"):
            # A worker that ends takes its file with it, and one that was killed is not believed any more.
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(path.read_text(encoding="utf-8"))
                os.kill(record["pid"], 0)
                records.append(record)
        return sorted(records, key=lambda record: int(record["rank"]))

    def remove(self, rank: int) -> None:
        """Take away the record of one worker, and the directory after the last one."""
        with contextlib.suppress(OSError):
            self._path(rank).unlink(missing_ok=True)
            self.directory.rmdir()

    def clear(self) -> None:
        """Take everything away: vLLM ends a server by killing its workers, which then cannot."""
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                path.unlink()
            self.directory.rmdir()

    def sweep(self) -> None:
        """Remove what servers that were killed have left behind, this one's own directory excepted."""
        for directory in self.directory.parent.glob(f"expertier-{os.getuid()}-*"):
            with contextlib.suppress(OSError):
                if directory == self.directory or time.time() - directory.stat().st_mtime < _STALE_SECONDS:
                    continue
                board = Board(directory.name.rpartition("-")[2], self.directory.parent)
                if not board.read():
                    board.clear()

    def _path(self, rank: int) -> Path:
        return self.directory / f"{rank}.json"


class Reporter:
    """Writes a worker's record to the board, and a line to vLLM's log, while the worker is busy.

    Parameters
    ----------
    board : Board
        Where to.
    read : callable
        Gives the record; called by a thread of our own, once a second, never by the one that computes.
    """

    def __init__(self, board: Board, read: Callable[[], Record]) -> None:
        self._board = board
        self._read = read
        self._rank = int(read()["rank"])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="expertier-reporter", daemon=True)

    def start(self) -> None:
        """Begin; ends by itself with the process."""
        atexit.register(self.close)
        self._thread.start()

    def close(self) -> None:
        """Stop, and take the record off the board. Closing twice does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._thread.join()
        self._board.remove(self._rank)

    def _work(self) -> None:
        self._board.sweep()
        interval = _log_interval()
        written: Any = None
        logged, at = read_stats(self._read()), time.monotonic()
        while True:
            record = self._read()
            if record != written:
                try:
                    self._board.write(record)
                except OSError as error:
                    _logger.warning("Expertier: /metrics will not show this worker: %s", error)
                    return
                written = record
            if self._ended.wait(_WRITE_SECONDS):
                return
            now = time.monotonic()
            if now - at >= interval:
                stats = read_stats(self._read())
                if stats != logged:
                    _logger.info("%s", log_line(self._rank, logged, stats, now - at))
                logged, at = stats, now


def _log_interval() -> float:
    try:
        return max(_WRITE_SECONDS, float(os.environ.get(_LOG_INTERVAL, "")))
    except ValueError:
        return _LOG_SECONDS


_published: Final[set[str]] = set()


def publish(instance: str) -> None:
    """Let vLLM's own ``/metrics`` show what the workers of a server put on their board, until this process ends.

    Upstream: ``vllm.v1.metrics.prometheus.get_prometheus_registry`` hands out the default registry of the Prometheus
    client. With several API servers (``--api-server-count``) it hands out one that knows no collectors; then only
    ``/expertier/metrics`` has these metrics.

    Parameters
    ----------
    instance : str
        As of :class:`Board`.
    """
    if instance in _published:
        return
    from prometheus_client import REGISTRY

    from expertier.telemetry.metrics import Collector

    board = Board(instance)
    REGISTRY.register(Collector(board.read))
    atexit.register(board.clear)
    _published.add(instance)
