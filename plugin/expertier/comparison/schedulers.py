"""Scheduling arms in a real engine: the same requests under each of them, in turns, in one process."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import psutil

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

_TURN: Final = 1.0
"""Seconds that an engine is served before it is another's turn, or more if it lingers."""

_LINGERING: Final = 4.0
"""A turn is so many times longer than the pause after it."""


class TrafficServer(Protocol):
    """An engine that serves many requests together, driven step by step.

    Attributes
    ----------
    admission : Admission
        Decides who joins. Under first come, first served it observes no routes, as in a server without regrouping: what
        observing costs belongs to the other arms.
    lingers : float
        Seconds for which the engine keeps a processor busy after its last step; nobody else is served in them.
    """

    admission: Admission
    lingers: float

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


class Serving:
    """Requests that a server answers by a clock of its own, which stands still while it is not its turn.

    Parameters
    ----------
    server : TrafficServer
        The engine; nothing is running in it.
    queue : Queue
        The requests.
    layers : int
        MoE layers of the model.
    """

    def __init__(self, server: TrafficServer, queue: Queue, *, layers: int) -> None:
        self._server = server
        self._asks = queue.asks
        self._arrivals = queue.arrivals()
        self._layers = layers
        self._before = server.stats()
        self._arrived: dict[int, float] = {}
        self._first = np.zeros(len(queue.asks))
        self._answered = np.zeros(len(queue.asks))
        self._got = np.zeros(len(queue.asks), np.int64)
        self._over = 0
        self._seconds = 0.0
        self._processor = 0.0

    def advance(self, seconds: float = math.inf) -> Served | None:
        """Serve for so long, and to the end of a step; returns what the requests got once all have been answered.

        Raises
        ------
        ExpertierError
            A request failed.
        """
        processor = processor_seconds()
        begin = time.perf_counter() - self._seconds
        end = self._seconds + seconds
        while self._over < len(self._asks) and self._seconds < end:
            now = time.perf_counter() - begin
            for number, at in self._arrivals.due(now, len(self._arrived) - self._over):
                self._arrived[number] = at
                self._server.submit(number, self._asks[number])
            if len(self._arrived) > self._over:
                told = self._server.step()
                now = time.perf_counter() - begin
                for number, tokens, done in told:
                    if tokens and not self._got[number]:
                        self._first[number] = now - self._arrived[number]
                    self._got[number] = tokens
                    if done:
                        self._answered[number] = now - self._arrived[number]
                        self._over += 1
            else:
                time.sleep(max(0.0, min(self._arrivals.next_at, end) - now))
            self._seconds = time.perf_counter() - begin
        self._processor += processor_seconds() - processor
        return self._sum_up() if self._over == len(self._asks) else None

    def _sum_up(self) -> Served:
        after = self._server.stats()
        decode = after.decode.since(self._before.decode)
        prefill = after.prefill.since(self._before.prefill)
        return Served(
            requests=self._over,
            output_tokens=int(self._got.sum()),
            steps=decode.steps + prefill.steps,
            decode_steps=decode.steps,
            decode_tokens=decode.tokens,
            decode_loads=decode.misses,
            loads=decode.misses + prefill.misses,
            bytes_read=after.bytes_read - self._before.bytes_read,
            seconds=self._seconds,
            stalled=decode.stall_seconds + prefill.stall_seconds,
            first_token=self._first,
            answered=self._answered,
            most_overtaken=self._server.admission.stats.most_overtaken,
            unique=decode.requests / max(1, decode.steps * self._layers),
            processor_seconds=self._processor,
        )


def serve_queue(server: TrafficServer, queue: Queue, *, layers: int) -> Served:
    """Serve requests to their end, by the clock."""
    served = Serving(server, queue, layers=layers).advance()
    assert served is not None
    return served


def processor_seconds() -> float:
    """Processor time so far of this process and those it started, in which engines compute."""
    total = time.process_time()  # the kernel counts others' in steps of 10 ms
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            times = child.cpu_times()
            total += times.user + times.system
    return total


class SchedulerComparison:
    """Serves the same requests under every arm.

    Parameters
    ----------
    servers : sequence of TrafficServer
        One engine, in which one arm is served after the other; or one for each arm, which then take turns of a second,
        so that whatever else the machine does for a while slows all of them alike.
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
        servers: Sequence[TrafficServer],
        texts: Sequence[Text],
        plan: TrafficPlan,
        *,
        layers: int,
        asks: Sequence[Ask] | None = None,
    ) -> None:
        self._asks = asks
        self._servers = servers
        self._plan = plan
        self._layers = layers
        self._asked, self._earlier = _halves(texts)
        self._books: list[PathBook | None] = [None] * len(servers)

    def prepare(self) -> None:
        """Let every server see what it has seen before, which also fills its memory."""
        count = self._plan.earlier
        length = min(_EARLIER_PROMPT, self._plan.prompt[1] + self._plan.output[1] - 1)
        texts = [self._earlier[place % len(self._earlier)].text for place in range(count)]
        for place, server in enumerate(self._servers):
            prompts = [server.tokenize(text[: 16 * length])[:length] for text in texts]
            asks = [Ask(prompt=tuple(prompt), output=1) for prompt in prompts if prompt]
            if asks:
                serve_queue(server, Queue(asks=asks, seconds=None, clients=len(asks)), layers=self._layers)
            self._books[place] = server.admission.book

    def run(self, arms: Sequence[str], seed: int, seen: Callable[[str], None] | None = None) -> list[TrafficRun]:
        """Serve one round; who is first changes from round to round.

        Parameters
        ----------
        arms : sequence of str
            As many as there are servers, unless there is one.
        seed : int
            Number of the round.
        seen : callable, optional
            Told the arm, or the arms, that are served next.
        """
        queue = self._queue(seed)
        in_turn = list(arms if seed % 2 == 0 else arms[::-1])
        alone = len(self._servers) == 1
        found: dict[str, Served] = {}
        for group in [{arm: 0} for arm in in_turn] if alone else [{arm: arms.index(arm) for arm in in_turn}]:
            if seen is not None:
                seen(", ".join(group))
            found |= self._serve(queue, group)
        return [TrafficRun.of(found[arm], arm=arm, seed=seed, batch=self._plan.batch) for arm in arms]

    def _queue(self, seed: int) -> Queue:
        plan = self._plan
        if self._asks is not None:
            seconds = None if self._asks[0].at is None else [ask.at or 0.0 for ask in self._asks]
            return Queue(asks=self._asks, seconds=seconds, clients=len(self._asks))
        asks = mixed_requests(
            self._asked,
            self._servers[0].tokenize,
            plan.requests,
            domains=plan.domains,
            prompt=plan.prompt,
            output=plan.output,
            seed=seed,
        )
        queue = Queue(asks=asks, seconds=None, clients=plan.clients)
        if plan.load is None:
            return queue
        # In every engine, so that none has an advantage over the others: experts of these requests stay in memory.
        full = [self._serve(queue, {CONTROL: place})[CONTROL].seconds for place in range(len(self._servers))]
        rate = plan.load * len(asks) / float(np.mean(full))
        return replace(queue, seconds=poisson_seconds(len(asks), rate, seed).tolist())

    def _serve(self, queue: Queue, places: Mapping[str, int]) -> dict[str, Served]:
        """Serve arms in the engines at these places, in turns where there are several."""
        servings = {arm: self._begin(place, queue, arm) for arm, place in places.items()}
        lingers = self._servers[0].lingers if len(servings) > 1 else 0.0
        turn = max(_TURN, _LINGERING * lingers) if len(servings) > 1 else math.inf
        found: dict[str, Served] = {}
        while len(found) < len(servings):
            for arm, serving in servings.items():
                if arm in found:
                    continue
                if (served := serving.advance(turn)) is not None:
                    found[arm] = served
                time.sleep(lingers)
        return found

    def _begin(self, place: int, queue: Queue, arm: str) -> Serving:
        server = self._servers[place]
        admission = server.admission
        admission.stats, admission.together = AdmissionStats(), Together()
        if arm == ORACLE:
            admission.batcher, admission.worth = make_batcher("similarity"), Worth("on")
            admission.book = KnownDomains([ask.domain for ask in queue.asks], server.number)
        else:
            admission.batcher, admission.worth = make_batcher(arm), Worth()
            admission.book = copy.deepcopy(self._books[place])
        return Serving(server, queue, layers=self._layers)


def _halves(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Every second text of each domain, and the others."""
    halves: tuple[list[Text], list[Text]] = ([], [])
    for number, text in numbered_by_domain(texts):
        halves[number % 2].append(text)
    return halves[0], halves[1] or halves[0]
