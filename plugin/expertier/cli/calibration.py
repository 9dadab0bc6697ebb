"""Measures an engine's speed with a model, in seconds: what a decoded token takes, and what every load adds to it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from expertier.catalog.types import Catalog
from expertier.cli.engines import Adapter, EngineSettings, get_adapter
from expertier.cli.profile import Reader
from expertier.config import OffloadOptions
from expertier.errors import UnsupportedEngineError
from expertier.planning.memory import memory_left
from expertier.planning.speed import EngineSpeed, SpeedSample, fit_speed
from expertier.routing import read_trace
from expertier.simulation import Events, load_events, replay

SHARES: Final = (0.25, 0.6, 0.9, 1.0)
_WARM_UP: Final = 32
_STEPS: Final = 96
_LEAST_STEPS: Final = 32
_MOST_SECONDS: Final = 6.0
_CONTEXT: Final = _WARM_UP + _STEPS


def calibrate_engine(
    model: Path, catalog: Catalog, options: OffloadOptions, *, engine: str, settings: EngineSettings
) -> EngineSpeed:
    """Decode some text under three budgets and, where memory allows, with everything resident.

    Parameters
    ----------
    model : Path
        The model.
    catalog : Catalog
        Its experts.
    options : OffloadOptions
        In force while measuring, but for the budget.
    engine : str
        Name of the adapter.
    settings : EngineSettings
        Threads count.

    Raises
    ------
    UnsupportedEngineError
        The adapter cannot be fed token by token.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    adapter = get_adapter(engine)
    settings = replace(settings, n_ctx=_CONTEXT)

    def opened(share: float, trace: Path | None) -> AbstractContextManager[Reader]:
        budget = max(int(share * catalog.total_expert_bytes), catalog.smallest_budget())
        written = f"{100 * share:g}%" if budget > catalog.smallest_budget() else budget
        kept = None if trace is None else str(trace)
        # Nothing is to be learned from text that nobody serves.
        chosen = replace(options.untraced(), budget=written, trace=kept, profile="off")
        return closing(_reader(adapter, model, chosen, settings))

    left = memory_left().left - catalog.other_bytes
    # What cannot be held cannot be measured; compute then counts as that of a step that happens to need no load.
    shares = [share for share in SHARES if share < 1.0 or 1.05 * catalog.total_expert_bytes < left]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "routes")
        with opened(shares[-1], trace) as session:
            tokens = _some_tokens(session)
            for _ in session.follow(tokens, prompt=1):
                pass
        events = load_events(read_trace(trace))
    samples = []
    total = events.header.total_bytes
    for share in shares:
        with opened(share, None) as session:
            budget = session.stats().budget_bytes
            seconds = measure_steps(session, tokens)
        loads = step_loads(events, options.plain_policy, budget)[_WARM_UP : _WARM_UP + len(seconds)]
        samples.append(SpeedSample(budget_bytes=budget, seconds=seconds, loads=loads))
    speed = fit_speed(
        samples, total_bytes=total, engine=engine, fingerprint=catalog.fingerprint, threads=settings.threads
    )
    given = {name: value for name, value in options.changed().items() if name not in ("budget", "config", "profile")}
    return replace(speed, options=given)


def _reader(adapter: Adapter, model: Path, options: OffloadOptions, settings: EngineSettings) -> Reader:
    session = adapter.open(model, options, settings)
    if not isinstance(session, Reader):
        session.close()
        raise UnsupportedEngineError(
            f"The adapter for {adapter.engine} cannot be measured token by token yet.", "Use --engine llamacpp."
        )
    return session


def measure_steps(session: Reader, tokens: Sequence[int]) -> tuple[float, ...]:
    """Decode tokens one by one and return the seconds of each but the first ones, which warm up."""
    seconds: list[float] = []
    began = started = time.perf_counter()
    for place, _ in enumerate(session.follow(tokens, prompt=1)):
        now = time.perf_counter()
        if place < _WARM_UP:
            began = now
        else:
            seconds.append(now - started)
            if len(seconds) >= _LEAST_STEPS and now - began > _MOST_SECONDS:
                break
        started = time.perf_counter()
    return tuple(seconds)


def step_loads(events: Events, policy: str, budget: int) -> tuple[int, ...]:
    """Loads of every step if nothing is loaded ahead: what the engine's own counters do not tell when something is."""
    if budget >= events.header.total_bytes:
        return (0,) * len(events.phase)
    misses = replay(events, policy, budget).misses
    return tuple(np.bincount(events.step, weights=misses, minlength=len(events.phase)).astype(int).tolist())


def _some_tokens(session: Reader) -> list[int]:
    """Text that every Python has: what a load costs does not depend on which experts it loads."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics)[:8])[:8192]
    tokens = session.tokenize(text)[:_CONTEXT]
    return (tokens * (_CONTEXT // len(tokens) + 1))[:_CONTEXT]
