"""Many replays of one trace: policies x budgets, with Belady and the bounds beside them."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertier.errors import ExpertierError, UnsupportedOptionError
from expertier.residency import POLICIES, WITH_HALF_LIFE
from expertier.routing.trace import Trace
from expertier.simulation.belady import belady
from expertier.simulation.events import Events, load_events
from expertier.simulation.predicted import FORECASTER, Sources
from expertier.simulation.prefetch import PREDICTORS, oracle_loads, replay_timed
from expertier.simulation.replay import policy_name, replay
from expertier.simulation.result import Replay
from expertier.simulation.timing import StepTimes, Timing, step_times

SCHEMA = "expertier-simulation/1"
BELADY = "belady"
_POLL_SECONDS = 0.2
_SMALL_BYTES = 1 << 16  # replaying a trace of this size is done before another process has started


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One replay.

    Attributes
    ----------
    policy : str
        A key of :data:`expertier.residency.POLICIES`, or ``belady``.
    half_life : float or None
        Of a frequency policy; ``None`` is its own.
    predictor : str or None
        A key of :data:`expertier.simulation.prefetch.PREDICTORS`, or what
        :meth:`expertier.simulation.predicted.Sources.check` accepts; ``None`` loads nothing ahead.
    forecaster : str or None
        Trained predictor that tells the policy what is coming.
    budget_text : str
        The budget as it was asked for.
    budget : int
        In bytes.
    """

    policy: str
    half_life: float | None = None
    predictor: str | None = None
    forecaster: str | None = None
    budget_text: str
    budget: int

    @property
    def label(self) -> str:
        """Name for people."""
        name = policy_name(self.policy, self.half_life)
        if self.forecaster is not None:
            name = f"{name} by {self.forecaster}"
        return name if self.predictor is None else f"{name} + {self.predictor}"


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What a replay found, in decode steps.

    Attributes
    ----------
    label, budget_text : str
        As in :class:`Arm`.
    budget_bytes, share : int, float
        The budget, and its part of all experts.
    hit_ratio : float
        Experts that were resident (or under way) when needed.
    ready_hit_ratio : float
        Those that were there without waiting.
    loads_per_token, bytes_per_token : float
        Loads somebody waited for, or began to; bytes of all loads.
    seconds : StepTimes or None
        Seconds per step; ``None`` when speeds are unknown.
    prefetch_seconds : float or None
        Seconds per step in simulated time, of an arm that loads ahead.
    ahead_share : float or None
        Of such an arm: loads that were under way or done when needed, among all that were needed.
    """

    label: str
    budget_text: str
    budget_bytes: int
    share: float
    hit_ratio: float
    ready_hit_ratio: float
    loads_per_token: float
    bytes_per_token: float
    seconds: StepTimes | None
    prefetch_seconds: float | None = None
    ahead_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A sweep, as it is written down.

    Attributes
    ----------
    trace, model, fingerprint : str
        File, model and its identity.
    tokens, steps, requests : int
        Decoded tokens, decode steps, and experts they needed.
    total_bytes : int
        Memory of all experts.
    timing : Timing or None
        Speeds used.
    timing_source : str
        Where they come from.
    arms : tuple of ArmResult
        In the order of budgets, Belady last for each.
    """

    schema: str = SCHEMA
    trace: str
    model: str
    fingerprint: str
    tokens: int
    steps: int
    requests: int
    total_bytes: int
    timing: Timing | None
    timing_source: str
    arms: tuple[ArmResult, ...]

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def parse_policy(text: str) -> tuple[str, float | None]:
    """Read ``lfu`` or ``lfu:8``.

    Raises
    ------
    UnsupportedOptionError
        There is no such policy, or the half-life is no number above zero.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise UnsupportedOptionError(
            f"There is no eviction policy {name!r}.", f"Choose from: {', '.join(POLICIES)} ({BELADY} is always there)."
        )
    if not rest:
        return name, None
    try:
        half_life = float(rest)
    except ValueError:
        half_life = 0.0
    if not 0 < half_life < float("inf"):
        raise UnsupportedOptionError(f"{rest!r} is not a half-life in tokens.", "Write e.g. lfu:16.")
    if name not in WITH_HALF_LIFE:
        raise UnsupportedOptionError(f"The eviction policy {name!r} has no half-life.", f"Write {name}.")
    return name, half_life


def run_arm(
    events: Events,
    arm: Arm,
    timing: Timing | None,
    seen: Callable[[int], None] | None = None,
    *,
    sources: Sources | None = None,
) -> ArmResult:
    """Replay one arm; `sources` are for those that predict.

    Raises
    ------
    BudgetError
        Some working set does not fit.
    UnsupportedOptionError
        A predictor without speeds, or an unknown one.
    """
    common: dict[str, Any] = {
        "label": arm.label,
        "budget_text": arm.budget_text,
        "budget_bytes": arm.budget,
        "share": arm.budget / events.header.total_bytes,
    }
    if arm.predictor is not None:
        if timing is None:
            raise UnsupportedOptionError(
                "Loads ahead of need are a matter of time, and the speeds of this machine are unknown.",
                "Give --model, or --bandwidth and --compute-ms.",
            )
        oracle = arm.predictor in PREDICTORS
        loads = oracle_loads(arm.predictor, events) if oracle else (sources or Sources()).loads(events, arm.predictor)
        timed = replay_timed(
            events,
            arm.policy,
            arm.budget,
            timing,
            half_life=arm.half_life,
            loads=loads,
            fill=not oracle,
            seen=seen,
        )
        requests = timed.ready_hits + timed.late + timed.misses
        return ArmResult(
            **common,
            hit_ratio=(timed.ready_hits + timed.late) / requests,
            ready_hit_ratio=timed.ready_hits / requests,
            loads_per_token=timed.misses / timed.tokens,
            bytes_per_token=timed.bytes_read / timed.tokens,
            seconds=None,
            prefetch_seconds=timed.seconds / timed.steps,
            ahead_share=timed.ahead / max(timed.ahead + timed.misses, 1),
        )
    found: Replay
    if arm.policy == BELADY:
        found = belady(events, arm.budget, seen=seen)
    else:
        forecasts = None if arm.forecaster is None or sources is None else sources.forecasts(events)
        found = replay(events, arm.policy, arm.budget, half_life=arm.half_life, forecasts=forecasts, seen=seen)
    return ArmResult(
        **common,
        hit_ratio=found.hit_ratio,
        ready_hit_ratio=found.hit_ratio,
        loads_per_token=found.loads_per_token(),
        bytes_per_token=found.bytes_per_token(events),
        seconds=None if timing is None else step_times(events, found, timing),
    )


def sweep(
    path: Path,
    arms: Sequence[Arm],
    timing: Timing | None,
    *,
    partial: bool = False,
    most_tokens: int | None = None,
    sources: Sources | None = None,
    jobs: int = 1,
    progress: Callable[[float], None] | None = None,
) -> tuple[ArmResult, ...]:
    """Replay many arms, several at a time.

    Parameters
    ----------
    path : Path
        The trace.
    arms : sequence of Arm
        What to replay.
    timing : Timing or None
        Speeds, if known.
    partial, most_tokens
        As for :func:`expertier.routing.read_trace` and :func:`load_events`.
    sources : Sources, optional
        For arms that predict.
    jobs : int
        Processes.
    progress : callable, optional
        Told how many arms are done, in fractions.
    """
    if jobs <= 1 or len(arms) == 1 or path.stat().st_size < _SMALL_BYTES:
        events = load_events(Trace(path, partial=partial), most_tokens=most_tokens)
        steps = len(events.phase)
        results = []
        for done, arm in enumerate(arms):

            def seen(step: int, done: int = done) -> None:
                if progress is not None:
                    progress(done + step / steps)

            results.append(run_arm(events, arm, timing, seen, sources=sources))
        if progress is not None:
            progress(len(arms))
        return tuple(results)
    context = multiprocessing.get_context("spawn")
    counter = context.Value("d", 0.0)
    setup = (str(path), partial, most_tokens, timing, sources, counter)
    with ProcessPoolExecutor(min(jobs, len(arms)), context, initializer=_set_up, initargs=setup) as pool:
        pending = {pool.submit(_run, arm): place for place, arm in enumerate(arms)}
        found: dict[int, ArmResult] = {}
        try:
            while len(found) < len(arms):
                for future in wait(pending, _POLL_SECONDS, FIRST_COMPLETED).done:
                    if pending[future] not in found:
                        found[pending[future]] = future.result()
                for future in [future for future in pending if pending[future] in found]:
                    del pending[future]
                if progress is not None:
                    progress(min(counter.value, len(arms)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(found[place] for place in range(len(arms)))


_worker: dict[str, Any] = {}


def _set_up(
    path: str, partial: bool, most_tokens: int | None, timing: Timing | None, sources: Sources | None, counter: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    _worker["events"] = load_events(Trace(Path(path), partial=partial), most_tokens=most_tokens)
    _worker["timing"] = timing
    _worker["sources"] = sources
    _worker["counter"] = counter


def _run(arm: Arm) -> ArmResult:
    events: Events = _worker["events"]
    counter = _worker["counter"]
    steps = len(events.phase)
    last = 0

    def seen(step: int) -> None:
        nonlocal last
        with counter.get_lock():
            counter.value += (step - last) / steps
        last = step

    result = run_arm(events, arm, _worker["timing"], seen, sources=_worker["sources"])
    seen(steps)
    return result


def read_simulation(path: Path) -> Simulation:
    """Read a record that :meth:`Simulation.write` wrote.

    Raises
    ------
    ExpertierError
        It is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema {data.get('schema')!r}")
        timing = None if data["timing"] is None else Timing(**data["timing"])
        arms = tuple(
            ArmResult(**{**arm, "seconds": None if arm["seconds"] is None else StepTimes(**arm["seconds"])})
            for arm in data["arms"]
        )
        return Simulation(**{**data, "timing": timing, "arms": arms})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExpertierError(
            f"{path} is not the record of a simulation: {error}.", "Run expertier simulate."
        ) from error


def plan_arms(
    budgets: Sequence[tuple[str, int]],
    policies: Sequence[str],
    predictors: Sequence[str],
    sources: Sources | None = None,
) -> list[Arm]:
    """Cross budgets with policies and, for the first policy, predictors; Belady comes with every budget.

    Raises
    ------
    UnsupportedOptionError
        A policy or predictor does not exist.
    """
    parsed = [parse_policy(text) for text in dict.fromkeys(policies)]
    for name in predictors:
        if name not in PREDICTORS:
            (sources or Sources()).check(name)
    trained = sources is not None and sources.predictor is not None
    arms = []
    for text, budget in dict.fromkeys(budgets):
        base = Arm(policy="", budget_text=text, budget=budget)
        for policy, half_life in parsed:
            forecaster = FORECASTER if trained and policy == "predictive" else None
            arms.append(dataclasses.replace(base, policy=policy, half_life=half_life, forecaster=forecaster))
        for predictor in dict.fromkeys(predictors):
            arms.append(dataclasses.replace(base, policy=parsed[0][0], half_life=parsed[0][1], predictor=predictor))
        arms.append(dataclasses.replace(base, policy=BELADY))
    return arms
