"""What machine this is."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from expertier.comparison.page_cache import Readahead
from expertier.comparison.records import Hardware


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def describe_hardware(model: Path) -> Hardware:
    """Describe this machine and the storage that holds `model`."""
    filesystem, device = filesystem_of(model)
    return Hardware(
        cpu=_cpu(),
        cores=cores(),
        memory_bytes=int(psutil.virtual_memory().total),
        kernel=f"{platform.system()} {platform.release()}",
        filesystem=filesystem,
        device=device,
        readahead_kb=Readahead(model).value(),
    )


def filesystem_of(path: Path, root: Path = Path("/")) -> tuple[str, str]:
    """Type of the filesystem that holds a file, and the block device below it (empty if there is none)."""
    number = os.stat(path).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    filesystem = "unknown"
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            filesystem = fields[fields.index("-") + 1]
            break
    link = root / "sys/dev/block" / wanted
    return filesystem, link.resolve().name if link.exists() else ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "hardware"):
            return value.strip()
    return platform.processor() or platform.machine()
