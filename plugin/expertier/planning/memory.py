"""How much memory this process may still use: the tightest of the machine and every control group above it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """One bound on this process's memory.

    Attributes
    ----------
    source : str
        ``machine``, or the path of the control group.
    limit : int
        The bound in bytes.
    left : int
        What may still be allocated under it; page cache that the kernel can drop counts as free.
    """

    source: str
    limit: int
    left: int


def memory_limits(root: Path = Path("/"), membership: str | None = None) -> list[MemoryLimit]:
    """Every memory bound on this process, tightest (least left) first.

    Parameters
    ----------
    root : Path
        Root of the file tree to look at (for tests).
    membership : str, optional
        Contents of ``/proc/self/cgroup`` (for tests).
    """
    limits = [_machine()]
    text = membership if membership is not None else _membership(root)
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += _groups(root / "sys/fs/cgroup", path, _read_v2)
            limits += _groups(root / "sys/fs/cgroup/unified", path, _read_v2)
        elif "memory" in controllers.split(","):
            limits += _groups(root / "sys/fs/cgroup/memory", path, _read_v1)
    return sorted(limits, key=lambda limit: limit.left)


def _machine() -> MemoryLimit:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return MemoryLimit(source="machine", limit=kib["MemTotal"] << 10, left=kib["MemAvailable"] << 10)


def _membership(root: Path) -> str:
    try:
        return (root / "proc/self/cgroup").read_text()
    except FileNotFoundError:
        return ""  # a kernel without control groups


def memory_left() -> MemoryLimit:
    """The tightest bound."""
    return memory_limits()[0]


def _groups(mount: Path, path: str, read: Callable[[Path], MemoryLimit | None]) -> list[MemoryLimit]:
    group = mount / path.lstrip("/")
    found = []
    while True:
        # Inside a container the path may be the host's; the mount point itself is then the container's group.
        if group.is_dir() and (bound := read(group)) is not None:
            found.append(bound)
        if group == mount:
            return found
        group = group.parent


def _stat(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}


def _read_v1(group: Path) -> MemoryLimit | None:
    try:
        limit = int((group / "memory.limit_in_bytes").read_text())
        used = int((group / "memory.usage_in_bytes").read_text())
        stat = _stat(group / "memory.stat")
    except OSError:
        return None
    if limit >= _UNLIMITED:
        return None
    cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return MemoryLimit(source=str(group), limit=limit, left=max(0, limit - used + cache))


def _read_v2(group: Path) -> MemoryLimit | None:
    bounds = []
    for name in ("memory.max", "memory.high"):  # beyond max a process is killed, beyond high it is slowed to a crawl
        with contextlib.suppress(OSError):
            text = (group / name).read_text().strip()
            bounds += [int(text)] if text != "max" else []
    try:
        used = int((group / "memory.current").read_text())
        stat = _stat(group / "memory.stat")
    except OSError:
        return None
    if not bounds:
        return None
    cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return MemoryLimit(source=str(group), limit=min(bounds), left=max(0, min(bounds) - used + cache))


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Memory of this process.

    Attributes
    ----------
    committed : int
        Private writable address space (``VmData``): what may become resident without further allocation.
    anonymous : int
        Resident anonymous memory (``RssAnon``).
    resident, peak : int
        Resident memory of all kinds (``VmRSS``), and the most it has been (``VmHWM``).
    """

    committed: int
    anonymous: int
    resident: int
    peak: int

    @property
    def untouched(self) -> int:
        """Allocated but not yet resident."""
        return self.committed - self.anonymous


def process_memory() -> ProcessMemory:
    """Read this process's numbers from ``/proc/self/status``."""
    values = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in ("VmData", "RssAnon", "VmRSS", "VmHWM"):
            values[key] = int(rest.split()[0]) * 1024
    return ProcessMemory(
        committed=values["VmData"], anonymous=values["RssAnon"], resident=values["VmRSS"], peak=values["VmHWM"]
    )


def reset_peak() -> None:
    """Have the peak of this process's memory begin anew; where that is not allowed it stays as it is."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
