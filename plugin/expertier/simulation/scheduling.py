"""Scheduling arms on recorded requests: who joins when, and what that loads, takes and delays."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.errors import UnsupportedOptionError
from expertier.residency.base import IntArray
from expertier.routing.trace_format import TraceHeader
from expertier.scheduling import BATCHERS, CONTROL, ORACLE, Admission, KnownDomains, PathBook, Worth, make_batcher
from expertier.simulation.requests import RecordedRequest, Texts, Traffic, cut_requests, poisson
from expertier.simulation.timing import Timing
from expertier.simulation.traffic import Served, serve

SCHEMA = "expertier-traffic/1"
FORESIGHT = "answers"
"""Name of the arm that is told what each answer will use: the bound for any forecast."""
REAL_ARMS = (*BATCHERS, ORACLE)
ARMS = (*REAL_ARMS, FORESIGHT)


@dataclass(frozen=True, kw_only=True)
class TrafficPlan:
    """What is asked of the simulated server.

    Attributes
    ----------
    requests : int
        Requests of one run.
    clients : int
        Requests that are there at a time; as many as `requests` are all there at once. Ignored with a load.
    load : float or None
        Rate of Poisson arrivals as a part of what first come, first served can do; ``None`` for clients that wait for
        their answers.
    domains : int or None
        Kinds of text in one run, drawn anew for each; ``None`` for all.
    prompt, output : tuple of int
        Least and most tokens.
    earlier : int
        Requests whose prompts and outputs the server saw before, of all domains: what a server that has run for a while
        knows.
    batch : int
        Most requests that run at a time.
    budget : int
        Bytes of resident experts.
    step_tokens : int
        Most tokens of a step.
    """

    requests: int = 64
    clients: int = 64
    load: float | None = None
    domains: int | None = None
    prompt: tuple[int, int] = (32, 128)
    output: tuple[int, int] = (64, 192)
    earlier: int = 64
    batch: int = 8
    budget: int
    step_tokens: int = 512

    def common(self) -> dict[str, Any]:
        """What all runs of a record have in common: everything but batch and budget."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch", "budget")}


@dataclass(frozen=True, kw_only=True)
class TrafficRun:
    """One arm on the requests of one seed.

    Attributes
    ----------
    arm, seed, batch
        Which.
    loads_per_token, bytes_per_token : float
        Of all steps, prompts included, per token of output.
    decode_loads_per_token : float
        Of steps without prompts, per token.
    unique : float
        Experts per layer of such a step.
    tokens_per_second : float
        Output, by the timing model.
    first_token_p50, first_token_p99 : float
        Seconds from arrival to the first token.
    answer_mean, answer_p99 : float
        Seconds from arrival to the last token.
    most_overtaken : int
        Later arrivals that ran before the same request.
    stalled : float
        Part of the time in which steps waited for loads.
    processor_per_token : float or None
        Seconds of processor time per token of output; not known of a simulated server. Unlike time that is not
        `stalled` it hardly depends on who else wants the cores.
    """

    arm: str
    seed: int
    batch: int
    loads_per_token: float
    bytes_per_token: float
    decode_loads_per_token: float
    unique: float
    tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    answer_mean: float
    answer_p99: float
    most_overtaken: int
    stalled: float
    processor_per_token: float | None = None

    @classmethod
    def of(cls, served: Served, *, arm: str, seed: int, batch: int) -> TrafficRun:
        """Sum up what the requests got."""
        p50, p99 = np.percentile(served.first_token, (50, 99))
        return cls(
            arm=arm,
            seed=seed,
            batch=batch,
            loads_per_token=served.loads / served.output_tokens,
            bytes_per_token=served.bytes_read / served.output_tokens,
            decode_loads_per_token=served.decode_loads / max(1, served.decode_tokens),
            unique=served.unique,
            tokens_per_second=served.output_tokens / served.seconds,
            first_token_p50=float(p50),
            first_token_p99=float(p99),
            answer_mean=float(served.answered.mean()),
            answer_p99=float(np.percentile(served.answered, 99)),
            most_overtaken=served.most_overtaken,
            stalled=served.stalled / served.seconds,
            processor_per_token=(
                None if served.processor_seconds is None else served.processor_seconds / served.output_tokens
            ),
        )


RATIOS = (
    "loads_per_token",
    "decode_loads_per_token",
    "tokens_per_second",
    "first_token_p50",
    "first_token_p99",
    "answer_mean",
)


@dataclass(frozen=True, kw_only=True)
class TrafficRecord:
    """All runs, as they are written down.

    Attributes
    ----------
    trace, model, fingerprint : str
        File (empty if requests were really served), model and its identity.
    plan : dict
        :class:`TrafficPlan`, without batch, and the share of the budget.
    timing : Timing or None
        Speeds; ``None`` if seconds are those of a clock.
    timing_source : str
        Where speeds or seconds come from.
    token_seconds : float
        Compute of every further token of a step.
    runs : tuple of TrafficRun
        By batch, seed and arm.
    """

    schema: str = SCHEMA
    trace: str
    model: str
    fingerprint: str
    plan: dict[str, Any]
    timing: Timing | None
    timing_source: str
    token_seconds: float
    runs: tuple[TrafficRun, ...] = field(default_factory=tuple)

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def batches(self) -> list[int]:
        """Batch sizes, in the order of the runs."""
        return list(dict.fromkeys(run.batch for run in self.runs))

    def arms(self) -> list[str]:
        """Arms, in the order of the runs."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    def of(self, batch: int, arm: str) -> list[TrafficRun]:
        """Runs of an arm, by seed."""
        return [run for run in self.runs if (run.batch, run.arm) == (batch, arm)]

    def ratio(self, batch: int, arm: str, name: str) -> tuple[float, float, float]:
        """Median, least and most over seeds of a figure against first come, first served."""
        pairs = zip(self.of(batch, arm), self.of(batch, CONTROL), strict=True)
        ratios = [getattr(run, name) / max(getattr(control, name), 1e-12) for run, control in pairs]
        return median(ratios), min(ratios), max(ratios)


def check_arms(arms: Sequence[str], known: Sequence[str] = ARMS) -> list[str]:
    """Put the control first and refuse names that are not `known`.

    Raises
    ------
    UnsupportedOptionError
        There is no such arm.
    """
    for arm in arms:
        if arm not in known:
            raise UnsupportedOptionError(f"There is no scheduling arm {arm!r}.", f"Choose from: {', '.join(known)}.")
    return list(dict.fromkeys([CONTROL, *arms]))


class _KnownAnswers(PathBook):
    """Describes a request by what its answer is going to use."""

    def __init__(self, requests: Sequence[RecordedRequest], shape: tuple[int, int]) -> None:
        super().__init__(*shape)
        self._answers = np.stack([self._used(request.routes[request.prompt - 1 :]) for request in requests])
        self._total, self._seen = self._answers.mean(axis=0), 1.0

    def _used(self, routes: IntArray) -> NDArray[np.float32]:
        flat = (routes + self._offset)[routes >= 0]
        return (np.bincount(flat, minlength=self.width) / len(routes)).astype(np.float32)

    def observe(self, requests: Sequence[Hashable], tokens: IntArray, routes: IntArray) -> None:
        pass

    def of_waiting(self, request: Hashable, tokens: IntArray) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._answers[int(str(request))]
        return row

    def of_running(self, request: Hashable) -> NDArray[np.float32]:
        return self.of_waiting(request, np.zeros(0, np.int64))


class TrafficSimulator:
    """Runs arms on requests cut from one trace.

    Parameters
    ----------
    header : TraceHeader
        The model.
    texts : Texts
        The recorded texts.
    timing : Timing
        Speeds.
    token_seconds : float
        Compute of every further token of a step.
    """

    def __init__(self, header: TraceHeader, texts: Texts, timing: Timing, token_seconds: float) -> None:
        self._header = header
        self._texts = texts
        self._timing = timing
        self._token_seconds = token_seconds
        self._shape = (len(header.layers), max(layer.experts for layer in header.layers))

    def run(
        self, plan: TrafficPlan, arms: Sequence[str], seed: int, seen: Callable[[], None] | None = None
    ) -> list[TrafficRun]:
        """Serve the same requests under every arm.

        Parameters
        ----------
        plan : TrafficPlan
            What is asked.
        arms : sequence of str
            Keys of :data:`ARMS`.
        seed : int
            Of requests and arrivals.
        seen : callable, optional
            Called after every arm.
        """
        requests = cut_requests(
            self._texts, plan.requests, domains=plan.domains, prompt=plan.prompt, output=plan.output, seed=seed
        )
        traffic = Traffic(requests=requests, clients=plan.clients)
        if plan.load is not None:
            full = self._serve(plan, Traffic(requests=requests, clients=plan.requests), CONTROL, seed)
            traffic = poisson(requests, plan.load * len(requests) / full.seconds, seed)
        runs = []
        for arm in arms:
            runs.append(TrafficRun.of(self._serve(plan, traffic, arm, seed), arm=arm, seed=seed, batch=plan.batch))
            if seen is not None:
                seen()
        return runs

    def _serve(self, plan: TrafficPlan, traffic: Traffic, arm: str, seed: int) -> Served:
        def admission(clock: Callable[[], float]) -> Admission:
            if arm == ORACLE:
                domains = [request.domain for request in traffic.requests]
                book = KnownDomains(domains, lambda name: int(str(name)))
                return Admission(make_batcher("similarity"), book, worth=Worth("on"), clock=clock)
            if arm == FORESIGHT:
                answers = _KnownAnswers(traffic.requests, self._shape)
                return Admission(make_batcher("similarity"), answers, worth=Worth("on"), clock=clock)
            return Admission(make_batcher(arm), self._book(plan, traffic.requests, seed), clock=clock)

        return serve(
            traffic,
            self._header.layers,
            admission,
            batch=plan.batch,
            budget=plan.budget,
            timing=self._timing,
            token_seconds=self._token_seconds,
            step_tokens=plan.step_tokens,
        )

    def _book(self, plan: TrafficPlan, requests: Sequence[RecordedRequest], seed: int) -> PathBook:
        """What a server knows that has served other texts."""
        book = PathBook(*self._shape)
        starts = {request.tokens[: request.prompt].tobytes() for request in requests}
        random = np.random.default_rng([seed, 1])
        left = plan.earlier
        for index in random.permutation(len(self._texts.tokens)).tolist():
            tokens, routes = self._texts.tokens[index], self._texts.routes[index]
            if not left:
                break
            if any(tokens[:length].tobytes() in starts for length in range(plan.prompt[0], plan.prompt[1] + 1)):
                continue  # one of those that will be asked
            for begin in range(0, len(tokens), 128):
                part = slice(begin, begin + 128)
                book.observe(["earlier"] * len(tokens[part]), tokens[part], routes[part])
            book.forget("earlier")
            left -= 1
        return book
