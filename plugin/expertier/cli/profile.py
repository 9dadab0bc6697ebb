"""``expertier profile``: reads texts and records what the routers choose."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from expertier.budget import format_bytes
from expertier.catalog import read_catalog
from expertier.catalog.types import Catalog
from expertier.cli.engines import EngineSettings, get_adapter
from expertier.cli.options import print_json
from expertier.cli.profile_checkpoint import ENGINE as CHECKPOINT
from expertier.cli.profile_checkpoint import read_checkpoint
from expertier.comparison.prompts import Text, interleaved, read_texts
from expertier.config import OffloadOptions
from expertier.errors import ExpertierError, UnsupportedEngineError, UnsupportedOptionError
from expertier.paths import cache_dir
from expertier.planning.calibrate import measure_disk
from expertier.routing import read_trace
from expertier.telemetry import Stats

_CHARACTERS_PER_TOKEN = 16  # more than any text needs
_CALIBRATION_BYTES = 128 << 20
_LEAST_STEPS = 32  # to tell compute from loading


@runtime_checkable
class Reader(Protocol):
    """A session of an engine that can be fed given tokens."""

    def mode_line(self) -> str:
        """One line that says what is being done."""

    def tokenize(self, text: str) -> list[int]:
        """Turn text into token ids, nothing added."""

    def follow(self, tokens: Sequence[int], *, prompt: int) -> Iterator[None]:
        """Compute given tokens: `prompt` of them at once, then one after the other; yields after every step."""

    def note(self, values: Mapping[str, Any]) -> None:
        """Leave measurements in the trace that is being recorded."""

    def stats(self) -> Stats:
        """Return the manager's counters."""

    def close(self) -> None:
        """Free everything."""


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """What the user asked for; see the flags of the command."""

    model: Path
    options: OffloadOptions
    texts: tuple[Path, ...]
    out: Path | None
    engine: str
    tokens: int
    per_text: int
    prompt: int
    settings: EngineSettings
    as_json: bool


@dataclass
class Measured:
    """Seconds, waiting and loads of every decode step, and the domain of every text."""

    seconds: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)

    def costs(self) -> dict[str, float]:
        """Tell compute apart from what a load costs beside waiting, by least squares over steps.

        Steps that took much longer than most, because the system did something else, are left out.
        """
        if len(self.seconds) < _LEAST_STEPS:
            return {}
        own = np.array(self.seconds) - np.array(self.stall)
        loads = np.array(self.loads, float)
        usual = own <= 2 * np.median(own)
        own, loads = own[usual], loads[usual]
        if loads.std() < 0.5:
            return {"compute_seconds_per_step": float(np.median(own)), "load_cost_seconds": 0.0}
        slope, start = np.polyfit(loads, own, 1)
        if slope < 0 or start <= 0:
            slope, start = 0.0, float(np.median(own))
        return {"compute_seconds_per_step": float(start), "load_cost_seconds": float(slope)}


def profile(request: ProfileRequest) -> None:
    """Feed texts token by token and record the routes."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    adapter = None if request.engine == CHECKPOINT else get_adapter(request.engine)
    texts = interleaved(given_texts(request.texts, "to profile with"))
    catalog = read_catalog(request.model)
    given = Path(request.options.trace) if request.options.trace else None
    out = request.out or given or trace_path(catalog)
    if adapter is None:
        with _progress(request.tokens) as advance:
            read_checkpoint(
                catalog,
                out,
                [replace(text, text=text.text[: request.per_text * _CHARACTERS_PER_TOKEN]) for text in texts],
                tokens=request.tokens,
                per_text=request.per_text,
                token_ids=request.options.trace_tokens == "on",
                advance=advance,
            )
        _report(request, out, None)
        return
    settings = replace(request.settings, n_ctx=request.settings.n_ctx or request.per_text)
    session = adapter.open(request.model, replace(request.options, trace=str(out)), settings)
    try:
        if not isinstance(session, Reader):
            raise UnsupportedEngineError(
                f"The adapter for {adapter.engine} cannot record routes.", "Use another engine."
            )
        print(session.mode_line(), file=sys.stderr, flush=True)
        measured = Measured()
        try:
            read_all(session, texts, measured, tokens=request.tokens, per_text=request.per_text, prompt=request.prompt)
        finally:
            session.note({"domains": measured.domains, **measured.costs(), "expert_share": expert_share(catalog)})
        disk = measure_disk(
            catalog.files,
            read_bytes=catalog.largest_expert_bytes,
            threads=request.options.io_threads,
            mode=request.options.io_mode,
            most_bytes=_CALIBRATION_BYTES,
        )
        session.note({"disk": asdict(disk)})
        stats = session.stats()
    finally:
        session.close()
    _report(request, out, stats)


def read_all(
    session: Reader, texts: Sequence[Text], measured: Measured, *, tokens: int, per_text: int, prompt: int
) -> None:
    """Feed texts to an engine: of each a prompt in one step, then token after token.

    Parameters
    ----------
    session : Reader
        The engine.
    texts : sequence of Text
        What to read; one without even two tokens is passed over.
    measured : Measured
        Grows with every step, so that an interrupt loses none.
    tokens, per_text : int
        Most tokens of all together, and of each.
    prompt : int
        Most tokens of a prompt.

    Raises
    ------
    ExpertierError
        None of them could be read.
    """
    read = 0
    with _progress(tokens) as advance:
        for text in texts:
            ids = session.tokenize(text.text[: per_text * _CHARACTERS_PER_TOKEN])
            ids = ids[: min(per_text, tokens - read)]
            if len(ids) < 2:
                continue
            start = min(prompt, len(ids) - 1)
            steps = session.follow(ids, prompt=start)
            next(steps)
            measured.domains.append(text.domain)
            before = session.stats().decode
            started = time.perf_counter()
            for _ in steps:
                measured.seconds.append(time.perf_counter() - started)
                after = session.stats().decode
                measured.stall.append(after.stall_seconds - before.stall_seconds)
                measured.loads.append(after.misses + after.late - before.misses - before.late)
                before = after
                advance(1)
                started = time.perf_counter()
            advance(start)
            read += len(ids)
            if read >= tokens:
                break
    if not read:
        raise ExpertierError("No text has even two tokens.", "Name files with some pages of text.")


def given_texts(paths: Sequence[Path], purpose: str) -> list[Text]:
    """Read the texts that were named.

    Raises
    ------
    UnsupportedOptionError
        None were, or there is nothing in them.
    """
    if not paths:
        raise UnsupportedOptionError(
            f"There is no text {purpose}.", "Name files with --text, of the kind the model will see."
        )
    texts = [text for path in paths for text in read_texts(path) if text.text.strip()]
    if not texts:
        names = ", ".join(path.name for path in paths)
        raise UnsupportedOptionError(f"There is no text in {names}.", "Name files with some pages of text.")
    return texts


def trace_path(catalog: Catalog) -> Path:
    """Where a model's trace goes unless told otherwise."""
    folder = cache_dir() / "traces"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExpertierError(
            f"The folder {folder} cannot be made: {error.strerror}.", "Name a file with --out."
        ) from error
    return folder / f"{catalog.path.stem}-{catalog.fingerprint[:12]}.trace"


def expert_share(catalog: Catalog) -> float:
    """Part of the weights a token touches that are experts: decoding is bound by memory."""
    experts = sum(layer.top_k * layer.expert_bytes for layer in catalog.layers)
    return experts / (experts + catalog.other_bytes)


def _report(request: ProfileRequest, out: Path, stats: Stats | None) -> None:
    trace = read_trace(out, least_tokens=2)
    size = out.stat().st_size
    if request.as_json:
        print_json(
            {
                "trace": str(out),
                "bytes": size,
                "tokens": trace.counts.tokens,
                "steps": trace.counts.steps,
                "requests": trace.counts.requests,
                "token_ids": trace.header.tokens,
                "notes": trace.notes,
                "stats": None if stats is None else stats.as_dict(),
            }
        )
        return
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(
        f"{out}: {trace.counts.tokens} tokens of {trace.counts.requests} texts, {format_bytes(size)}, "
        f"{'with' if trace.header.tokens else 'without'} token ids, no text"
    )
    hits = "" if stats is None else f"hits while recording {100 * stats.decode.hit_ratio:.1f} %; "
    train = f" / expertier train {out}" if trace.header.tokens else ""
    console.print(f"[dim]{hits}next: expertier simulate {out} / expertier report {out}{train}[/]")


@contextmanager
def _progress(tokens: int) -> Iterator[Any]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda count: None
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=tokens, rate="")
        started = time.perf_counter()

        def advance(count: int) -> None:
            progress.advance(task, count)
            done = progress.tasks[0].completed
            progress.update(task, rate=f"{done / (time.perf_counter() - started):.0f} tok/s")

        yield advance
