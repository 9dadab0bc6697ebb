"""``expertier run``."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from expertier.budget import format_bytes
from expertier.cli.engines import EngineSettings, Session, get_adapter
from expertier.cli.options import print_json
from expertier.config import OffloadOptions
from expertier.errors import ModelNotFoundError, UnsupportedOptionError
from expertier.telemetry import Stats

_REFRESH_SECONDS = 0.25


def run(
    model: Path,
    options: OffloadOptions,
    *,
    prompt: str | None,
    prompt_file: Path | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    chat: bool,
    engine: str,
    settings: EngineSettings,
    as_json: bool,
) -> None:
    """Generate text: text on stdout, everything about it on stderr."""
    # Compute threads that wait for an expert must not spin on the cores that the reading threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    adapter = get_adapter(engine)
    if not os.path.exists(model):  # a Path's own method raises where a folder may not be looked into
        raise ModelNotFoundError(f"There is no file {model} that could be read.", "Check the path and its permissions.")
    text = _prompt(prompt, prompt_file)
    started = time.perf_counter()
    session = adapter.open(model, options, settings)
    try:
        meter = _Meter(session, time.perf_counter() - started)
        print(session.mode_line(), file=sys.stderr, flush=True)
        pieces = []
        with _LiveLine(meter, shown=sys.stderr.isatty()) as live:
            for piece in session.generate(text, chat=chat, max_tokens=max_tokens, temperature=temperature, seed=seed):
                meter.note()
                pieces.append(piece)
                live.write("" if as_json else piece)
        figures = meter.finish()
        if as_json:
            print_json(
                {
                    "model": str(model),
                    "engine": {adapter.engine: adapter.versions()},
                    "mode": session.mode_line(),
                    "prompt": text,
                    "text": "".join(pieces),
                    **figures.__dict__,
                    "stats": session.stats().as_dict(),
                }
            )
        else:
            print(flush=True)
        print(f"expertier: {figures.line()}", file=sys.stderr)
    finally:
        session.close()


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise UnsupportedOptionError("--prompt and --prompt-file exclude each other.", "Give one of them.")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        try:
            return prompt_file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UnsupportedOptionError(
                f"Cannot read {prompt_file}: {error.strerror}.", "Check --prompt-file."
            ) from error
    if sys.stdin.isatty():
        print("expertier: type the prompt, end it with Ctrl-D", file=sys.stderr)
    return sys.stdin.read()


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """What a run measured; the rates are those of the decoded tokens after the first.

    Attributes
    ----------
    load_seconds, ttft_seconds, decode_seconds : float
        Loading, prompt to first token, and all tokens after it.
    tokens : int
        Decode steps.
    tokens_per_second : float or None
        ``None`` if there were none.
    hit_ratio, read_bytes_per_token, stall_ms_per_token : float or None
        The same.
    """

    load_seconds: float
    ttft_seconds: float
    decode_seconds: float
    tokens: int
    tokens_per_second: float | None
    hit_ratio: float | None
    read_bytes_per_token: float | None
    stall_ms_per_token: float | None

    def line(self) -> str:
        """Summarise in one line."""
        start = f"loaded in {self.load_seconds:.2f} s, first token after {self.ttft_seconds:.2f} s"
        return start if self.tokens_per_second is None else f"{self.rates()}; {start}"

    def rates(self) -> str:
        """Return the five fields of the live line."""
        if self.tokens_per_second is None:
            return "reading the prompt"
        hits = "-" if self.hit_ratio is None else f"{100 * self.hit_ratio:.0f} %"
        return (
            f"{self.tokens} tokens, {self.tokens_per_second:.1f} tok/s, hits {hits}, "
            f"{format_bytes(int(self.read_bytes_per_token or 0))}/token, stall {self.stall_ms_per_token:.1f} ms/token"
        )


class _Meter:
    """Turns counters into rates of the decode part."""

    def __init__(self, session: Session, load_seconds: float) -> None:
        self._session = session
        self._load_seconds = load_seconds
        self._started = time.perf_counter()
        self._first: float | None = None
        self._at_first = Stats()
        self._last = self._started

    def note(self) -> None:
        """Note that a piece of text has come."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
            self._at_first = self._session.stats()

    def finish(self) -> RunFigures:
        """Return the figures up to the last piece."""
        first = self._first if self._first is not None else self._last
        seconds = self._last - first
        now, before = self._session.stats(), self._at_first
        tokens = now.decode.tokens - before.decode.tokens if self._first is not None else 0
        requests = now.decode.requests - before.decode.requests
        misses = now.decode.misses - before.decode.misses
        stall = now.decode.stall_seconds - before.decode.stall_seconds
        known = tokens > 0 and seconds > 0
        return RunFigures(
            load_seconds=self._load_seconds,
            ttft_seconds=first - self._started,
            decode_seconds=seconds,
            tokens=tokens,
            tokens_per_second=tokens / seconds if known else None,
            hit_ratio=1 - misses / requests if known and requests else None,
            read_bytes_per_token=(now.bytes_read - before.bytes_read) / tokens if known else None,
            stall_ms_per_token=1e3 * stall / tokens if known else None,
        )


class _LiveLine:
    """Text on stdout and, on a terminal, a line of rates that follows it."""

    def __init__(self, meter: _Meter, *, shown: bool) -> None:
        self._meter = meter
        self._live: Live | None = None
        self._both_terminals = shown and sys.stdout.isatty()
        self._refreshed = 0.0
        if shown:
            # On one terminal the text scrolls above the line, so rich has to print both.
            console = Console(stderr=not self._both_terminals)
            self._live = Live(console=console, transient=True, auto_refresh=False)
        self._pending = ""

    def __enter__(self) -> _LiveLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._pending:
            sys.stdout.write(self._pending)

    def write(self, piece: str) -> None:
        """Show a piece of text."""
        if self._live is None or not self._both_terminals:
            sys.stdout.write(piece)
            sys.stdout.flush()
            self._refresh("")
            return
        # A line that is not finished yet is part of the live display; finished ones go above it.
        *lines, self._pending = (self._pending + piece).split("\n")
        for line in lines:
            self._live.console.print(Text(line))
        self._refresh(self._pending)

    def _refresh(self, unfinished: str) -> None:
        now = time.perf_counter()
        if self._live is None or (now - self._refreshed < _REFRESH_SECONDS and not unfinished):
            return
        self._refreshed = now
        rates = Text(self._meter.finish().rates(), style="dim")
        self._live.update(Text(unfinished + "\n").append_text(rates) if unfinished else rates, refresh=True)
