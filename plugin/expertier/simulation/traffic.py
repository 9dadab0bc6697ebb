"""Requests that come, wait, run together and go, replayed through the real admission and the real offload manager."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertier.manager import ManagerConfig, OffloadManager
from expertier.residency.base import IntArray
from expertier.routing.trace_format import TraceLayer
from expertier.scheduling import Admission, resident_experts
from expertier.scheduling.arrivals import Arrivals
from expertier.simulation.pools import CountingPool
from expertier.simulation.requests import RecordedRequest, Traffic
from expertier.simulation.timing import Timing, staged_end


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the requests got.

    Attributes
    ----------
    requests, output_tokens, steps : int
        Counts.
    decode_steps, decode_tokens, decode_loads : int
        Of steps without any prompt.
    loads, bytes_read : int
        Of all steps.
    seconds : float
        From the first arrival to the last token.
    stalled : float
        Seconds of these in which steps waited for loads.
    first_token : ndarray of float64, shape (requests,)
        Seconds each request waited for its first token, in order of arrival.
    answered : ndarray of float64, shape (requests,)
        Seconds from its arrival to its last token.
    most_overtaken : int
        Later arrivals that ran before the same request.
    unique : float
        Experts per layer of a decode step.
    processor_seconds : float or None
        Processor time; not known of a simulated server.
    """

    requests: int
    output_tokens: int
    steps: int
    decode_steps: int
    decode_tokens: int
    decode_loads: int
    loads: int
    bytes_read: int
    seconds: float
    stalled: float
    first_token: NDArray[np.float64]
    answered: NDArray[np.float64]
    most_overtaken: int
    unique: float
    processor_seconds: float | None = None


@dataclass
class _Active:
    request: RecordedRequest
    number: int
    done: int = 0
    arrived: float = 0.0
    answered: bool = False


def serve(
    traffic: Traffic,
    layers: Sequence[TraceLayer],
    make_admission: Callable[[Callable[[], float]], Admission],
    *,
    batch: int,
    budget: int,
    timing: Timing,
    token_seconds: float = 0.0,
    step_tokens: int = 512,
    policy: str = "lfu",
    seen: Callable[[int], None] | None = None,
) -> Served:
    """Serve recorded requests with continuous batching.

    Parameters
    ----------
    traffic : Traffic
        Who asks when.
    layers : sequence of TraceLayer
        The model.
    make_admission : callable
        Called with a clock of simulated seconds.
    batch : int
        Most requests that run at a time.
    budget : int
        Bytes of resident experts.
    timing : Timing
        Speeds; `compute` is a step of one token.
    token_seconds : float
        Compute of every further token of a step.
    step_tokens : int
        Most tokens of a step; longer prompts take several.
    policy : str
        Eviction policy.
    seen : callable, optional
        Told the number of requests that are over.
    """
    pool = CountingPool(layers)
    manager = OffloadManager(
        experts={layer.layer: layer.experts for layer in layers},
        top_k={layer.layer: layer.top_k for layer in layers},
        pool=pool,
        budget=budget,
        config=ManagerConfig(policy=policy, io_threads=1),
    )
    now = stalled = 0.0
    admission = make_admission(lambda: now)
    numbers = [layer.layer for layer in layers]
    width = max(layer.experts for layer in layers)
    stages = np.array([layer.stages for layer in layers])
    requests = traffic.requests
    arrivals = Arrivals(len(requests), seconds=traffic.seconds, clients=traffic.clients)
    arrived: dict[int, float] = {}
    first, answered = np.zeros(len(requests)), np.zeros(len(requests))
    running: dict[int, _Active] = {}
    over = steps = decode_steps = decode_tokens = decode_loads = output = 0
    unique = 0

    try:
        while over < len(requests):
            for number, at in arrivals.due(now, len(arrived) - over):
                arrived[number] = at
                admission.arrive(number, requests[number].tokens[: requests[number].prompt])
            room = batch - len(running)
            if room and not admission.holds(room):
                choice = len(arrived) - over - len(running) > room
                resident = resident_experts(manager, numbers, width) if choice else None
                for name in admission.propose(room, resident=resident):
                    admission.joined(name)
                    number = int(str(name))
                    running[number] = _Active(requests[number], number)
            if not running:
                now = arrivals.next_at
                continue
            left = step_tokens
            parts: list[tuple[_Active, int]] = []
            # Whoever decodes goes first, as in the engines; prompts share what is left of the step.
            for active in sorted(running.values(), key=lambda item: item.done < item.request.prompt):
                count = 1 if active.done >= active.request.prompt else active.request.prompt - active.done
                count = min(count, left)
                if count:
                    parts.append((active, count))
                    left -= count
            routes = np.concatenate([a.request.routes[a.done : a.done + count] for a, count in parts])
            tokens = np.concatenate([a.request.tokens[a.done : a.done + count] for a, count in parts])
            names: list[Hashable] = [a.number for a, count in parts for _ in range(count)]
            decode = all(a.done >= a.request.prompt for a, _ in parts)
            before = pool.loads
            reads = np.zeros(len(numbers))
            counts = np.zeros(len(numbers), np.int64)
            manager.begin_step(len(tokens), "decode" if decode else "prefill")
            for place, layer in enumerate(numbers):
                loads, volume = pool.loads, pool.bytes_read
                chosen = routes[:, place, : layers[place].top_k]
                chosen = chosen[chosen[:, 0] >= 0]
                if not len(chosen):
                    continue
                manager.observe(layer, chosen)
                lease = manager.acquire(layer, chosen, wait=False)
                if decode:
                    unique += len(lease)
                lease.release()
                counts[place] = pool.loads - loads
                reads[place] = pool.bytes_read - volume
            manager.end_step()
            admission.observe(names, tokens, routes)
            admission.step(len(tokens) if decode else 0, pool.loads - before)
            compute = timing.compute + token_seconds * (len(tokens) - 1)
            seconds = _seconds(reads, counts, stages, timing, compute)
            now += seconds
            stalled += seconds - compute
            steps += 1
            if decode:
                decode_steps += 1
                decode_tokens += len(tokens)
                decode_loads += pool.loads - before
            for active, count in parts:
                active.done += count
                if active.done < active.request.prompt:
                    continue
                if not active.answered:
                    first[active.number] = now - arrived[active.number]
                    active.answered = True
                output += 1
                if active.done == len(active.request.tokens):
                    answered[active.number] = now - arrived[active.number]
                    del running[active.number]
                    admission.leave(active.number)
                    over += 1
                    if seen is not None:
                        seen(over)
    finally:
        manager.close()
    return Served(
        requests=over,
        output_tokens=output,
        steps=steps,
        decode_steps=decode_steps,
        decode_tokens=decode_tokens,
        decode_loads=decode_loads,
        loads=pool.loads,
        bytes_read=pool.bytes_read,
        seconds=now,
        stalled=stalled,
        first_token=first,
        answered=answered,
        most_overtaken=admission.stats.most_overtaken,
        unique=unique / max(1, decode_steps * len(numbers)),
    )


def _seconds(reads: NDArray[np.float64], loads: IntArray, stages: IntArray, timing: Timing, compute: float) -> float:
    """Seconds of a step."""
    head = compute / len(reads) * (1 - timing.expert_share)
    tail = compute / len(reads) * timing.expert_share
    end = staged_end(timing.latency * (loads > 0), reads / timing.bandwidth, stages, tail)
    return float((head + timing.load_cost * loads + end).sum())
