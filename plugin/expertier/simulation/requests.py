"""Recorded requests, and when they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertier.errors import TraceTooShortError, UnsupportedOptionError
from expertier.residency.base import IntArray
from expertier.routing.trace import Trace
from expertier.scheduling.arrivals import poisson_seconds


@dataclass(frozen=True, kw_only=True)
class RecordedRequest:
    """A request of a trace.

    Attributes
    ----------
    prompt : int
        Tokens of the prompt.
    tokens : ndarray of int64, shape (tokens,)
        Token ids of prompt and output; -1 where they were not recorded.
    routes : ndarray of int64, shape (tokens, layers, top_k)
        What the router chose for each of them; -1 where a layer did not run.
    domain : str
        What kind of text it is, if known.
    """

    prompt: int
    tokens: IntArray
    routes: IntArray
    domain: str = ""

    @property
    def output(self) -> int:
        """Tokens it is given: the last row of routes makes the last of them."""
        return len(self.tokens) - self.prompt + 1


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Who asks when.

    Attributes
    ----------
    requests : sequence of RecordedRequest
        In order of arrival.
    seconds : ndarray of float64, shape (requests,), or None
        When they arrive (open loop); ``None`` for clients that ask again when they have been answered.
    clients : int
        Requests that are there at a time, in a closed loop.
    """

    requests: Sequence[RecordedRequest]
    seconds: NDArray[np.float64] | None = None
    clients: int = 0


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Whole sequences of a trace, to cut requests from.

    Attributes
    ----------
    tokens, routes : list of ndarray
        As in :class:`RecordedRequest`.
    domains : list of str
        What kind of text each one is; empty where it was not recorded.
    """

    tokens: list[IntArray]
    routes: list[IntArray]
    domains: list[str]

    @classmethod
    def of_trace(cls, trace: Trace) -> Texts:
        """Read all sequences.

        Raises
        ------
        TraceTooShortError
            There is none.
        """
        table = trace.tokens()
        ids = np.full(len(table.request), -1) if table.token_id is None else table.token_id
        starts = np.flatnonzero(np.diff(table.request.astype(np.int64), prepend=-1))
        spans = list(zip(starts.tolist(), [*starts[1:].tolist(), len(table.request)], strict=True))
        if not spans:
            raise TraceTooShortError(f"{trace.path} holds no request.", "Record more text.")
        noted = trace.notes.get("domains")
        domains = [str(name) for name in noted] if isinstance(noted, list) else []
        return cls(
            tokens=[ids[start:stop].astype(np.int64) for start, stop in spans],
            routes=[table.routes[start:stop].astype(np.int64) for start, stop in spans],
            domains=([""] * len(spans) + domains)[-len(spans) :],
        )


def cut_requests(
    texts: Texts,
    count: int,
    *,
    domains: int | None,
    prompt: tuple[int, int],
    output: tuple[int, int],
    seed: int,
) -> list[RecordedRequest]:
    """Cut requests of random length out of recorded texts, as many of each domain, in random order.

    Parameters
    ----------
    texts : Texts
        The recorded texts; those shorter than prompt and output at their longest give shorter outputs.
    count : int
        Requests.
    domains : int or None
        Kinds of text, drawn at random; ``None`` for all.
    prompt, output : tuple of int
        Least and most tokens.
    seed : int
        Of everything random.

    Raises
    ------
    UnsupportedOptionError
        There are fewer domains.
    TraceTooShortError
        No text is long enough for a prompt and two tokens.
    """
    random = np.random.default_rng(seed)
    usable: dict[str, list[int]] = {}
    for index, tokens in enumerate(texts.tokens):
        if len(tokens) > prompt[1] + 2:
            usable.setdefault(texts.domains[index], []).append(index)
    if not usable:
        raise TraceTooShortError(
            f"No recorded text has more than {prompt[1] + 2} tokens.", "Record longer texts: --tokens-per-text."
        )
    names = sorted(usable)
    if domains is not None:
        if domains > len(names):
            raise UnsupportedOptionError(
                f"The trace has {len(names)} domains of long enough text, not {domains}.",
                "Ask for fewer, or record texts with domains (a JSON list of objects with domain and text).",
            )
        names = sorted(random.choice(names, domains, replace=False).tolist())
    piles = {name: random.permutation(usable[name]).tolist() for name in names}
    requests = []
    for number in range(count):
        name = names[number % len(names)]
        pile = piles[name]
        index = pile[number // len(names) % len(pile)]
        begin = int(random.integers(prompt[0], prompt[1] + 1))
        end = min(begin + int(random.integers(output[0], output[1] + 1)) - 1, len(texts.tokens[index]))
        requests.append(
            RecordedRequest(
                prompt=begin, tokens=texts.tokens[index][:end], routes=texts.routes[index][:end], domain=name
            )
        )
    return [requests[place] for place in random.permutation(count)]


def poisson(requests: Sequence[RecordedRequest], rate: float, seed: int) -> Traffic:
    """Let requests arrive independently of each other, `rate` a second on average."""
    return Traffic(requests=requests, seconds=poisson_seconds(len(requests), rate, seed))
