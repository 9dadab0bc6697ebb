"""Scheduling arms in a real engine: the same requests under each of them, in turns, in one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from expertier.comparison.prompts import Text, numbered_by_domain
from expertier.comparison.traffic import Ask, mixed_requests
from expertier.scheduling import (
    CONTROL,
    ORACLE,
    Admission,
    AdmissionStats,
    KnownDomains,
    PathBook,
    Together,
    Worth,
    make_batcher,
)
from expertier.scheduling.arrivals import Arrivals, poisson_seconds
from expertier.simulation.scheduling import TrafficPlan, TrafficRun
from expertier.simulation.traffic import Served
from expertier.telemetry import Stats

_EARLIER_PROMPT = 256
"""Tokens that are read of a text which the server has seen before."""


class TrafficServer(Protocol):
    """An engine that serves many requests together, driven step by step.

    Attributes
    ----------
    admission : Admission
        Decides who joins. Under first come, first served it observes no routes, as in a server without regrouping: what
        observing costs belongs to the other arms.
    """

    admission: Admission

    def mode_line(self) -> str:
        """One line that says what is being done."""

    def tokenize(self, text: str) -> list[int]:
        """Turn text into token ids, nothing added."""

    def submit(self, number: int, ask: Ask) -> None:
        """Queue a request and call it by that number."""

    def number(self, name: Hashable) -> int:
        """Turn the admission's name of a request into its number."""

    def step(self) -> list[tuple[int, int, bool]]:
        """Compute a step: numbers of requests that got tokens, how many they have now, and whether that was all.

        Raises
        ------
        ExpertierError
            A request failed.
        """

    def stats(self) -> Stats:
        """Return the manager's counters."""

    def close(self) -> None:
        """Free everything."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Requests of one run and when they come."""

    asks: Sequence[Ask]
    seconds: Sequence[float] | None
    clients: int

    def arrivals(self) -> Arrivals:
        """Begin anew."""
        return Arrivals(len(self.asks), seconds=self.seconds, clients=self.clients)


def serve_queue(server: TrafficServer, queue: Queue, *, layers: int) -> Served:
    """Serve requests to their end, by the clock."""
    asks, arrivals = queue.asks, queue.arrivals()
    before = server.stats()
    begin = time.perf_counter()
    arrived: dict[int, float] = {}
    first = np.zeros(len(asks))
    got = np.zeros(len(asks), np.int64)
    over = 0
    while over < len(asks):
        now = time.perf_counter() - begin
        for number, at in arrivals.due(now, len(arrived) - over):
            arrived[number] = at
            server.submit(number, asks[number])
        if len(arrived) == over:
            time.sleep(max(0.0, arrivals.next_at - now))
            continue
        told = server.step()
        now = time.perf_counter() - begin
        for number, tokens, done in told:
            if tokens and not got[number]:
                first[number] = now - arrived[number]
            got[number] = tokens
            over += done
    seconds = time.perf_counter() - begin
    after = server.stats()
    decode = after.decode.since(before.decode)
    prefill = after.prefill.since(before.prefill)
    return Served(
        requests=over,
        output_tokens=int(got.sum()),
        steps=decode.steps + prefill.steps,
        decode_steps=decode.steps,
        decode_tokens=decode.tokens,
        decode_loads=decode.misses,
        loads=decode.misses + prefill.misses,
        bytes_read=after.bytes_read - before.bytes_read,
        seconds=seconds,
        stalled=decode.stall_seconds + prefill.stall_seconds,
        first_token=first,
        most_overtaken=server.admission.stats.most_overtaken,
        unique=decode.requests / max(1, decode.steps * layers),
    )


class SchedulerComparison:
    """Serves the same requests under every arm.

    Parameters
    ----------
    server : TrafficServer
        The engine.
    texts : sequence of Text
        What requests are cut from; every second text of a domain is kept for what the server saw before.
    plan : TrafficPlan
        What is asked.
    layers : int
        MoE layers of the model.
    asks : sequence of Ask, optional
        What a log recorded, in place of requests cut from texts; every round serves the same.

    Notes
    -----
    All arms of a round know the same: what the texts before the first round taught. Nobody learns from another arm's
    run, because the prompts are the same.
    """

    def __init__(
        self,
        server: TrafficServer,
        texts: Sequence[Text],
        plan: TrafficPlan,
        *,
        layers: int,
        asks: Sequence[Ask] | None = None,
    ) -> None:
        self._asks = asks
        self._server = server
        self._plan = plan
        self._layers = layers
        self._asked, self._earlier = _halves(texts)
        self._book: PathBook | None = None

    def prepare(self) -> None:
        """Let the server see what it has seen before, which also fills its memory."""
        count = self._plan.earlier
        length = min(_EARLIER_PROMPT, self._plan.prompt[1] + self._plan.output[1] - 1)
        texts = [self._earlier[place % len(self._earlier)].text for place in range(count)]
        prompts = [self._server.tokenize(text[: 16 * length])[:length] for text in texts]
        asks = [Ask(prompt=tuple(prompt), output=1) for prompt in prompts if prompt]
        if asks:
            serve_queue(self._server, Queue(asks=asks, seconds=None, clients=len(asks)), layers=self._layers)
        self._book = self._server.admission.book

    def run(self, arms: Sequence[str], seed: int, seen: Callable[[str], None] | None = None) -> list[TrafficRun]:
        """Serve one round; arms take turns in the other order every second round."""
        plan = self._plan
        queue = self._queue(seed)
        found = {}
        for arm in arms if seed % 2 == 0 else arms[::-1]:
            if seen is not None:
                seen(arm)
            found[arm] = TrafficRun.of(self._serve(queue, arm), arm=arm, seed=seed, batch=plan.batch)
        return [found[arm] for arm in arms]

    def _queue(self, seed: int) -> Queue:
        plan = self._plan
        if self._asks is not None:
            seconds = None if self._asks[0].at is None else [ask.at or 0.0 for ask in self._asks]
            return Queue(asks=self._asks, seconds=seconds, clients=len(self._asks))
        asks = mixed_requests(
            self._asked,
            self._server.tokenize,
            plan.requests,
            domains=plan.domains,
            prompt=plan.prompt,
            output=plan.output,
            seed=seed,
        )
        queue = Queue(asks=asks, seconds=None, clients=plan.clients)
        if plan.load is None:
            return queue
        full = self._serve(queue, CONTROL)
        rate = plan.load * len(asks) / full.seconds
        return replace(queue, seconds=poisson_seconds(len(asks), rate, seed).tolist())

    def _serve(self, queue: Queue, arm: str) -> Served:
        admission = self._server.admission
        admission.stats, admission.together = AdmissionStats(), Together()
        if arm == ORACLE:
            admission.batcher, admission.worth = make_batcher("similarity"), Worth("on")
            admission.book = KnownDomains([ask.domain for ask in queue.asks], self._server.number)
        else:
            admission.batcher, admission.worth = make_batcher(arm), Worth()
            admission.book = copy.deepcopy(self._book)
        return serve_queue(self._server, queue, layers=self._layers)


def _halves(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Every second text of each domain, and the others."""
    halves: tuple[list[Text], list[Text]] = ([], [])
    for number, text in numbered_by_domain(texts):
        halves[number % 2].append(text)
    return halves[0], halves[1] or halves[0]
