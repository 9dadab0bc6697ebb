"""``expertier doctor``: looks at everything a run depends on, before it depends on it."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from expertier import __version__
from expertier.budget import format_bytes
from expertier.catalog import read_catalog
from expertier.catalog.types import Catalog
from expertier.cli.engines import Finding, FindingStatus, find_adapters
from expertier.cli.options import EXIT_REFUSED, print_json
from expertier.comparison.hardware import cores, filesystem_of
from expertier.comparison.limits import confinements, probe
from expertier.comparison.page_cache import Readahead, drop_method
from expertier.errors import ExpertierError
from expertier.paths import cache_dir
from expertier.planning.calibrate import DiskSpeed, measure_disk
from expertier.planning.memory import memory_limits
from expertier.planning.plan import make_plan

_MARKS: dict[FindingStatus, str] = {
    "ok": "[green]ok[/]",
    "info": "[dim]info[/]",
    "warning": "[yellow]warning[/]",
    "problem": "[red]problem[/]",
}
_SAMPLE_BYTES = 128 << 20
_TYPICAL_EXPERT = 4 << 20
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_OTHER_MAPPINGS = 2000  # libraries, heaps and thread stacks of an engine
_MAPPINGS_PER_EXPERT = 2  # its window and the gap behind it


def doctor(model: Path | None, *, as_json: bool) -> None:
    """Collect and print findings; exit code 2 if something would be refused."""
    with Status("looking around", console=Console(stderr=True)):
        findings: list[Finding] = []
        catalog = None
        if model is not None:
            try:
                catalog = read_catalog(model)
            except ExpertierError as error:
                findings.append(_refusal("model", error))
        findings += [*_engines(catalog), *_kernel(catalog)]
        disk, storage = _storage(catalog)
        findings += [*storage, *_memory(), *_limits_of_others()]
        if catalog is not None:
            findings += _model(catalog)
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings], "disk": asdict(disk) if disk else None})
    else:
        _print(findings)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(EXIT_REFUSED)


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        text = escape(finding.text)
        if finding.remedy:
            text += f" [italic]{escape(finding.remedy)}[/]"
        table.add_row(_MARKS[finding.status], escape(finding.topic), text)
    Console().print(table)


def _refusal(topic: str, error: ExpertierError) -> Finding:
    text = f"{type(error).__name__}: {error.problem}"
    return Finding(topic=topic, status="problem", text=text, remedy=error.remedy)


def _engines(catalog: Catalog | None) -> Iterator[Finding]:
    yield Finding(
        topic="expertier",
        status="ok",
        text=f"{__version__}, Python {platform.python_version()}, {cores()} cores for this process",
    )
    adapters, reasons = find_adapters()
    found = False
    for adapter in adapters.values():
        versions = adapter.versions()
        if versions:
            found = True
            text = ", ".join(f"{distribution} {version}" for distribution, version in versions.items())
            yield Finding(topic=adapter.engine, status="ok", text=text)
            yield from adapter.findings(catalog)
        else:
            yield Finding(topic=adapter.engine, status="info", text="not installed", remedy=adapter.install)
    for name, reason in reasons.items():
        yield Finding(topic=name, status="info", text=f"not available: {reason}")
    if not found:
        yield Finding(
            topic="engines",
            status="problem",
            text="no engine is installed that Expertier has an adapter for.",
            remedy="Install one; pip install 'expertier[llamacpp]' needs a compiler and nothing else.",
        )


def _kernel(catalog: Catalog | None) -> Iterator[Finding]:
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    recent = match is not None and (int(match[1]), int(match[2])) >= (5, 7)
    yield Finding(
        topic="kernel",
        status="ok" if recent else "warning",
        text=f"{platform.system()} {release}"
        + ("" if recent else ", older than 5.7: an expert's memory cannot be moved, evictions are slower"),
    )
    if _HUGE_PAGES.exists():
        setting = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
        chosen = setting[1] if setting else "unknown"
        never = chosen == "never"
        yield Finding(
            topic="huge pages",
            status="warning" if never else "ok",
            text=f"transparent huge pages: {chosen}" + (": reads into experts pin many small pages" if never else ""),
            remedy=f"echo madvise > {_HUGE_PAGES}" if never else "",
        )
    if _MAP_COUNT.exists():
        allowed = int(_MAP_COUNT.read_text())
        needed = _OTHER_MAPPINGS + _MAPPINGS_PER_EXPERT * (catalog.expert_count if catalog else 0)
        enough = allowed >= needed
        yield Finding(
            topic="mappings",
            status="ok" if enough else "warning",
            text=f"vm.max_map_count is {allowed}"
            + ("" if enough else f", this model may need {needed} with everything resident"),
            remedy="" if enough else f"sysctl vm.max_map_count={2 * needed}",
        )


def _storage(catalog: Catalog | None) -> tuple[DiskSpeed | None, list[Finding]]:
    if catalog is not None:
        return _measure(list(catalog.files), catalog.largest_expert_bytes, "where the model lies")
    try:
        directory = cache_dir()
        with tempfile.NamedTemporaryFile(dir=directory) as sample:
            block = os.urandom(1 << 20)  # storage that compresses must not look faster than it is
            for _ in range(_SAMPLE_BYTES // len(block)):
                sample.write(block)
            sample.flush()
            os.fsync(sample.fileno())
            os.posix_fadvise(sample.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return _measure([Path(sample.name)], _TYPICAL_EXPERT, f"of the cache directory {directory}")
    except OSError as error:
        text = f"the cache directory cannot be measured: {error.strerror}"
        return None, [Finding(topic="storage", status="warning", text=text)]
    except ExpertierError as error:
        return None, [_refusal("storage", error)]


def _measure(files: list[Path], read_bytes: int, where: str) -> tuple[DiskSpeed | None, list[Finding]]:
    filesystem, device = filesystem_of(files[0])
    try:
        speed = measure_disk(files, read_bytes=read_bytes)
    except ExpertierError as error:
        return None, [_refusal("storage", error)]
    on = f" on {device}" if device else ""
    found = [
        Finding(
            topic="storage",
            status="ok",
            text=f"{filesystem}{on} {where}: {format_bytes(int(speed.sequential))}/s in sequence, "
            f"{format_bytes(int(speed.random))}/s in random reads of {format_bytes(speed.read_bytes)}",
        )
    ]
    if speed.direct:
        found.append(Finding(topic="O_DIRECT", status="ok", text="yes: experts bypass the page cache"))
    else:
        found.append(
            Finding(
                topic="O_DIRECT",
                status="warning",
                text="this filesystem refuses it; reads go through the page cache and the figures may be memory's.",
                remedy="Keep the model on ext4, xfs or btrfs.",
            )
        )
    readahead = Readahead(files[0])
    value = readahead.value()
    if value is not None:
        obstacle = readahead.obstacle()
        how = "can be changed for comparisons" if not obstacle else f"cannot be changed: {obstacle}"
        slow = " (much more than stock llama.cpp likes in little memory)" if value > 1024 else ""
        found.append(Finding(topic="readahead", status="info", text=f"{value} KiB{slow}; {how}"))
    return speed, found


def _memory() -> Iterator[Finding]:
    for index, limit in enumerate(memory_limits()):
        name = "this machine" if limit.source == "machine" else limit.source
        tightest = " (the tightest: budget auto uses it)" if index == 0 else ""
        yield Finding(
            topic="memory",
            status="info",
            text=f"{name}: {format_bytes(limit.left)} left of {format_bytes(limit.limit)}{tightest}",
        )


def _limits_of_others() -> Iterator[Finding]:
    tried = {way.name: probe(way) for way in confinements()}
    usable = [name for name, reason in tried.items() if not reason]
    for name, reason in tried.items():
        if reason:
            yield Finding(topic="memory limits", status="info", text=f"cannot be set with {name}: {reason}")
    if usable:
        text = f"comparisons can limit memory with {', '.join(usable)}"
        yield Finding(topic="memory limits", status="ok", text=text)
    else:
        yield Finding(
            topic="memory limits",
            status="warning",
            text="no way to limit a process's memory: comparisons can only run without a limit.",
            remedy="Run as root, or log in through systemd so that systemd-run --user works.",
        )
    yield Finding(topic="page cache", status="info", text=f"comparisons start cold by {drop_method()}")


def _model(catalog: Catalog) -> Iterator[Finding]:
    kinds = ", ".join(sorted({part.type_name for layer in catalog.layers for part in layer.parts}))
    yield Finding(
        topic="model",
        status="ok",
        text=f"{catalog.architecture}: {catalog.expert_count} experts ({kinds}) in {len(catalog.layers)} layers, "
        f"{format_bytes(catalog.total_expert_bytes)} of {format_bytes(catalog.file_bytes)}",
    )
    try:
        plan = make_plan(catalog, "auto", limits=memory_limits())
    except ExpertierError as error:
        yield _refusal("budget auto", error)
        return
    yield Finding(
        topic="budget auto",
        status="ok",
        text=f"about {format_bytes(plan.budget_bytes)}: {plan.resident_experts} of {plan.total_experts} experts",
    )
