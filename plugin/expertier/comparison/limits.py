"""Memory limits enforced by the kernel: whatever kind of control group this machine lets us make.

Tried in this order: cgroup v1, a cgroup v2 subtree that we may write to, a transient systemd scope. All of them
count page cache against the limit, which is what makes a comparison with a memory-mapped engine fair.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_counter = itertools.count()
_PROBE_BYTES = 256 << 20
# The shell joins the group and then becomes the program, so that not one page of it is charged elsewhere.
_JOIN = 'echo $$ > "$1" && shift && exec "$@"'


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Memory of a finished or running group: high-water mark in bytes (``None`` = unknown) and processes killed."""

    peak_bytes: int | None
    oom_kills: int


class Group(Protocol):
    """A control group for one process."""

    def wrap(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` inside the group from its first page on."""

    def watch(self, pid: int) -> None:
        """Note the figures of the running process; called every now and then while it runs."""

    def usage(self) -> Usage:
        """Return the figures."""

    def close(self) -> None:
        """Remove the group."""


class Confinement(Protocol):
    """A way of making groups.

    Attributes
    ----------
    name : str
        E.g. ``cgroup v1``.
    """

    name: str

    def open(self, limit: int | None) -> Group:
        """Make a group that may use `limit` bytes (``None``: it is only observed).

        Raises
        ------
        OSError
            It cannot be made here.
        """


class _DirectoryGroup:
    """A group that is a directory below ``/sys/fs/cgroup``."""

    def __init__(self, path: Path, peak: str, events: str) -> None:
        self.path = path
        self._peak, self._events = path / peak, path / events

    def wrap(self, command: Sequence[str]) -> list[str]:
        return ["/bin/sh", "-c", _JOIN, "sh", str(self.path / "cgroup.procs"), *command]

    def watch(self, pid: int) -> None:
        pass

    def usage(self) -> Usage:
        return Usage(peak_bytes=_read_int(self._peak), oom_kills=_read_key(self._events, "oom_kill"))

    def close(self) -> None:
        # A group whose last process has just ended may stay busy for a moment.
        for _ in range(100):
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.05)
        self.path.rmdir()


class V1Confinement:
    """The ``memory`` controller of cgroup v1: a child of our own group, so that limits above us stay in force."""

    name = "cgroup v1"

    def __init__(self, root: Path = Path("/"), membership: str | None = None) -> None:
        self._parent = root / "sys/fs/cgroup/memory"
        own = self._parent / _membership(root, membership, "memory")
        if own.is_dir():
            self._parent = own

    def open(self, limit: int | None) -> Group:
        if not (self._parent / "memory.limit_in_bytes").exists():
            raise OSError("there is no memory controller of cgroup v1")
        path = _make(self._parent)
        try:
            if limit is not None:
                (path / "memory.limit_in_bytes").write_text(str(limit))
                with contextlib.suppress(OSError):  # only where swap is accounted
                    (path / "memory.memsw.limit_in_bytes").write_text(str(limit))
        except OSError:
            path.rmdir()
            raise
        return _DirectoryGroup(path, "memory.max_usage_in_bytes", "memory.oom_control")


class V2Confinement:
    """A cgroup v2 subtree in which the memory controller may be used: our own group, or the one above it."""

    name = "cgroup v2"

    def __init__(self, root: Path = Path("/"), membership: str | None = None) -> None:
        self._mount = root / "sys/fs/cgroup"
        own = self._mount / _membership(root, membership, "")
        self._candidates = [own] if own == self._mount else [own, own.parent]

    def open(self, limit: int | None) -> Group:
        reason: OSError = OSError("the memory controller is not delegated to this user")
        for parent in self._candidates:
            try:
                # Groups with processes cannot pass controllers on, so nothing is switched on here: it is used where
                # whoever runs this machine has delegated it.
                if "memory" in (parent / "cgroup.subtree_control").read_text().split():
                    return self._open_below(parent, limit)
            except FileNotFoundError:
                reason = OSError(f"there is no cgroup v2 hierarchy at {self._mount}")
            except OSError as error:
                reason = error
        raise reason

    def _open_below(self, parent: Path, limit: int | None) -> Group:
        path = _make(parent)
        try:
            if limit is not None:
                (path / "memory.max").write_text(str(limit))
                with contextlib.suppress(OSError):  # only where there is swap
                    (path / "memory.swap.max").write_text("0")
        except OSError:
            path.rmdir()
            raise
        return _DirectoryGroup(path, "memory.peak", "memory.events")


class _ScopeGroup:
    """A transient scope; it vanishes with its last process, so its figures are read while that runs."""

    def __init__(self, command: Sequence[str], root: Path) -> None:
        self._command = list(command)
        self._root = root
        self._usage = Usage(peak_bytes=None, oom_kills=0)

    def wrap(self, command: Sequence[str]) -> list[str]:
        return [*self._command, *command]

    def watch(self, pid: int) -> None:
        try:
            membership = (self._root / f"proc/{pid}/cgroup").read_text()
            path = self._root / "sys/fs/cgroup" / _membership(self._root, membership, "")
        except OSError:
            return
        if path.suffix != ".scope" or not path.name.startswith("expertier-"):
            return  # systemd-run has not moved itself yet
        peak = _read_int(path / "memory.peak")
        if peak is not None:
            self._usage = Usage(peak_bytes=peak, oom_kills=_read_key(path / "memory.events", "oom_kill"))

    def usage(self) -> Usage:
        return self._usage

    def close(self) -> None:
        pass


class ScopeConfinement:
    """``systemd-run --scope``: systemd makes the group, of this user or (as root) of the system."""

    def __init__(self, *, user: bool, root: Path = Path("/")) -> None:
        self._user = user
        self._root = root
        self.name = "systemd-run --user --scope" if user else "systemd-run --scope"

    def open(self, limit: int | None) -> Group:
        program = shutil.which("systemd-run")
        if program is None:
            raise OSError("there is no systemd-run")
        command = [program, "--scope", "--quiet", "--collect", f"--unit=expertier-{os.getpid()}-{next(_counter)}"]
        command += ["--user"] * self._user
        if limit is not None:
            command += ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
        return _ScopeGroup([*command, "--"], self._root)


def confinements() -> list[Confinement]:
    """All ways of confining a process, best first."""
    ways: list[Confinement] = [V1Confinement(), V2Confinement(), ScopeConfinement(user=True)]
    if os.geteuid() == 0:
        ways.append(ScopeConfinement(user=False))
    return ways


def probe(way: Confinement) -> str:
    """Try a way with a real process. Returns the reason why it does not work, empty if it does."""
    try:
        group = way.open(_PROBE_BYTES)
        try:
            done = subprocess.run(
                group.wrap(["/bin/true"]),
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        finally:
            group.close()
    except (OSError, subprocess.TimeoutExpired) as error:
        return (getattr(error, "strerror", None) or str(error)).rstrip(".")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1].rstrip(".")
    return ""


def find_confinement() -> tuple[Confinement | None, dict[str, str]]:
    """Choose the first way that works.

    Returns
    -------
    way : Confinement or None
        ``None`` if no limit can be enforced here.
    reasons : dict of str to str
        Ways that were tried in vain, with the reason.
    """
    reasons: dict[str, str] = {}
    for way in confinements():
        reason = probe(way)
        if not reason:
            return way, reasons
        reasons[way.name] = reason
    return None, reasons


def _membership(root: Path, text: str | None, controller: str) -> str:
    """Our path in a hierarchy: that of `controller` (cgroup v1) or, for the empty name, of cgroup v2."""
    if text is None:
        text = (root / "proc/self/cgroup").read_text()
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    return ""


def _make(parent: Path) -> Path:
    path = parent / f"expertier-{os.getpid()}-{next(_counter)}"
    path.mkdir()
    return path


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_key(path: Path, key: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0
