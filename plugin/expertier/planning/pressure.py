"""How hard memory is pressed now: what the tightest limit leaves, and how long tasks wait for memory (PSI)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expertier.planning.memory import MemoryLimit, memory_limits


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """One reading.

    Attributes
    ----------
    limit : MemoryLimit
        The tightest bound on this process.
    some, full : float or None
        Share of the last ten seconds in which some task, or all of them, waited for memory; ``None`` where the kernel
        does not tell.
    """

    limit: MemoryLimit
    some: float | None = None
    full: float | None = None


def read_pressure(root: Path = Path("/"), membership: str | None = None) -> Pressure:
    """Read limits and stall information, of our own control group where it has them.

    Parameters
    ----------
    root, membership
        As for :func:`expertier.planning.memory.memory_limits`.
    """
    limit = memory_limits(root, membership)[0]
    # Only a group of cgroup v2 has a file of its own; everywhere else there is that of the machine.
    for path in (Path(limit.source) / "memory.pressure", root / "proc/pressure/memory"):
        try:
            text = path.read_text()
        except OSError:  # a kernel without PSI, or with PSI switched off
            continue
        found = _averages(text)
        return Pressure(limit=limit, some=found.get("some"), full=found.get("full"))
    return Pressure(limit=limit)


def _averages(text: str) -> dict[str, float]:
    """Read ``some avg10=1.50 avg60=...`` as fractions."""
    found = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        for field in rest.split():
            name, _, value = field.partition("=")
            if name == "avg10":
                found[kind] = float(value) / 100
    return found
