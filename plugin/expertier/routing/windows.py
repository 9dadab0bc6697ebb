"""Traces as text to learn from: whole sequences, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from expertier.errors import TraceMismatchError, TraceTooShortError, UnsupportedOptionError
from expertier.routing.predictor import RoutedModel
from expertier.routing.trace import TokenTable, Trace

_LEAST_REQUESTS = 4  # to keep one back and to learn from others


@dataclass(frozen=True, kw_only=True)
class RouterInputs:
    """Sampled inputs of routers, for the lookahead.

    Attributes
    ----------
    window, offset, place : ndarray of int64, shape (samples,)
        Of which token and layer position.
    hidden : ndarray of float16, shape (samples, hidden)
        The inputs.
    """

    window: NDArray[np.int64]
    offset: NDArray[np.int64]
    place: NDArray[np.int64]
    hidden: NDArray[np.float16]

    def take(self, rows: NDArray[np.int64]) -> RouterInputs:
        """Return those of some windows, which are numbered anew."""
        number = np.full(max(int(self.window.max(initial=-1)), int(rows.max(initial=-1))) + 1, -1)
        number[rows] = np.arange(len(rows))
        new = number[self.window]
        kept = new >= 0
        return RouterInputs(
            window=new[kept], offset=self.offset[kept], place=self.place[kept], hidden=self.hidden[kept]
        )


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Stretches of sequences of equal length, the last one of a sequence filled up with unknowns.

    Attributes
    ----------
    model : RoutedModel
        Whose routes.
    tokens : ndarray of int64, shape (windows, width)
        Ids; 0 where the trace has none.
    request : ndarray of int64, shape (windows,)
        Of which request; windows of one stay together when some are kept back.
    routes : ndarray of int16, shape (windows, width, layers, largest top_k)
        Experts, -1 where unknown.
    domain : ndarray of str, shape (windows,), or None
        What kind of text it is; empty where the recorder did not say.
    inputs : RouterInputs or None
        Of some tokens, where the traces have them.
    """

    model: RoutedModel
    tokens: NDArray[np.int64]
    request: NDArray[np.int64]
    routes: NDArray[np.int16]
    domain: NDArray[np.str_] | None = None
    inputs: RouterInputs | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: NDArray[np.int64]) -> Windows:
        """Return some of the windows."""
        return Windows(
            model=self.model,
            tokens=self.tokens[rows],
            request=self.request[rows],
            routes=self.routes[rows],
            domain=None if self.domain is None else self.domain[rows],
            inputs=None if self.inputs is None else self.inputs.take(rows),
        )

    def split(self, parts: int) -> tuple[Windows, Windows]:
        """Keep every `parts`-th request back, beginning with the first; return the others and these."""
        back = np.isin(self.request, np.unique(self.request)[::parts])
        return self.take(np.flatnonzero(~back)), self.take(np.flatnonzero(back))

    def apart(self, domains: Sequence[str]) -> tuple[Windows, Windows]:
        """Return the text of all other domains, and that of these.

        Raises
        ------
        UnsupportedOptionError
            There is no text of one of them, or none of others.
        """
        held = np.full(len(self), "") if self.domain is None else self.domain
        back = np.isin(held, domains)
        present = set(held.tolist()) - {""}
        if missing := [name for name in domains if name not in present]:
            raise UnsupportedOptionError(
                f"The traces hold no text of the domain {missing[0]!r}.",
                f"Choose from: {', '.join(sorted(present)) or 'none, because they do not say what they are of'}.",
            )
        if back.all():
            raise UnsupportedOptionError("No text is left to learn from.", "Keep fewer domains back.")
        return self.take(np.flatnonzero(~back)), self.take(np.flatnonzero(back))

    @property
    def count(self) -> int:
        """Tokens with routes."""
        return int(self.known.any(2).sum())

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return int(self.tokens.shape[1])

    @property
    def known(self) -> NDArray[np.bool_]:
        """Of which tokens the routes of which layers are known, shape ``(windows, width, layers)``."""
        return self.routes[..., 0] >= 0

    def used(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """1 where a token uses an expert, shape ``(len(rows), width, layers * most experts)``."""
        layers, experts = self.model.shape
        routes = self.routes[rows]
        table = np.zeros((len(rows), self.width, layers * experts + 1), np.float32)
        cells = np.where(routes >= 0, routes + (np.arange(layers) * experts)[:, None], layers * experts)
        np.put_along_axis(table, cells.reshape(len(rows), self.width, -1), 1.0, axis=2)
        return table[..., :-1]

    def frequency(self) -> NDArray[np.float32]:
        """Share of tokens that use each expert, shape ``(layers, most experts)``."""
        layers, experts = self.model.shape
        table = np.zeros((layers, experts), np.float32)
        for place in range(layers):
            routes = self.routes[:, :, place]
            counts = np.bincount(routes[routes >= 0], minlength=experts)
            table[place] = counts / max(1, int((routes[..., 0] >= 0).sum()))
        return table


def read_windows(traces: Sequence[Trace], *, width: int = 256) -> tuple[Windows, bool]:
    """Cut the sequences of traces into windows.

    Parameters
    ----------
    traces : sequence of Trace
        Of one model; conversions of it count as the same (:meth:`RoutedModel.same_routes`).
    width : int
        Tokens of a window.

    Returns
    -------
    windows : Windows
        Of all traces.
    tokens : bool
        Whether all traces have token ids.

    Raises
    ------
    TraceMismatchError
        The traces are of different models.
    TraceTooShortError
        A trace has no step with two tokens of one sequence after another.
    """
    model = RoutedModel.of_trace(traces[0].header)
    found: list[Windows] = []
    requests = 0
    with_ids = True
    for trace in traces:
        other = RoutedModel.of_trace(trace.header)
        if not model.same_routes(other):
            raise TraceMismatchError(
                f"{trace.path} is a trace of {other.name}, {traces[0].path} one of {model.name}.",
                "Train on traces of one model.",
            )
        table = trace.tokens()
        with_ids &= table.token_id is not None
        windows = _cut(model, table, width, requests, _samples(trace) if trace.header.hidden_size else None)
        if not len(windows):
            held = {0: "no token", 1: "a single token"}.get(len(table.request), "no two tokens in a row")
            raise TraceTooShortError(f"{trace.path} holds {held}: there is nothing to learn from.", "Record more text.")
        found.append(replace(windows, domain=_domains(trace, windows.request - requests)))
        requests = int(windows.request.max()) + 1
    joined = Windows(
        model=model,
        tokens=np.concatenate([windows.tokens for windows in found]),
        request=np.concatenate([windows.request for windows in found]),
        routes=np.concatenate([windows.routes for windows in found]),
        domain=np.concatenate([windows.domain for windows in found if windows.domain is not None]),
        inputs=_join_inputs(found),
    )
    return joined, with_ids


def _domains(trace: Trace, requests: NDArray[np.int64]) -> NDArray[np.str_]:
    """Of which domain each request is, as its recorder noted; only the last ones, if a trace was continued."""
    noted = trace.notes.get("domains")
    names = [str(name) for name in noted] if isinstance(noted, list) else []
    count = int(requests.max(initial=-1)) + 1
    found: NDArray[np.str_] = np.array(([""] * count + names)[-count:], np.str_)[requests]
    return found


def _join_inputs(found: Sequence[Windows]) -> RouterInputs | None:
    starts = np.cumsum([0, *(len(windows) for windows in found)])
    parts = [(start, windows.inputs) for start, windows in zip(starts, found, strict=False) if windows.inputs]
    if not parts:
        return None
    return RouterInputs(
        window=np.concatenate([start + part.window for start, part in parts]),
        offset=np.concatenate([part.offset for _, part in parts]),
        place=np.concatenate([part.place for _, part in parts]),
        hidden=np.concatenate([part.hidden for _, part in parts]),
    )


def _samples(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float16]]:
    """Return of the sampled router inputs the token's place in the trace, the layer position, and the numbers."""
    tokens, places, hidden = [], [], []
    before = 0
    for block in trace.blocks():
        ends = before + np.cumsum(block.step_tokens, dtype=np.int64)
        call = block.hidden_call.astype(np.int64)
        tokens.append(ends[block.call_step[call]] - block.call_rows[call] + block.hidden_row)
        places.append(block.call_layer[call].astype(np.int64))
        hidden.append(block.hidden)
        before += len(block.request)
    if not tokens:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, trace.header.hidden_size), np.float16)
    return np.concatenate(tokens), np.concatenate(places), np.concatenate(hidden)


def require_requests(windows: Windows, least: int = _LEAST_REQUESTS) -> None:
    """Refuse traces with too few sequences to keep some back.

    Raises
    ------
    TraceTooShortError
        There are fewer than `least`.
    """
    count = len(np.unique(windows.request))
    if count < least:
        raise TraceTooShortError(
            f"The traces hold {count} sequence{'' if count == 1 else 's'}; "
            f"at least {least} are needed, because some are kept back.",
            "Record more texts.",
        )


def _cut(
    model: RoutedModel,
    table: TokenTable,
    width: int,
    requests: int,
    samples: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float16]] | None,
) -> Windows:
    """Sort a trace by request and cut it where positions do not go on, and after every `width` tokens."""
    order = np.argsort(table.request, kind="stable")
    request, position = table.request[order].astype(np.int64), table.position[order]
    ids = np.zeros(len(order), np.int64) if table.token_id is None else table.token_id[order].astype(np.int64)
    goes_on = np.zeros(len(order), bool)
    goes_on[1:] = (request[1:] == request[:-1]) & ((position[1:] == position[:-1] + 1) | (position[1:] < 0))
    starts = np.flatnonzero(~goes_on)
    lengths = np.diff(np.append(starts, len(order)))
    within = np.arange(len(order)) - np.repeat(starts, lengths)
    new = within % width == 0
    window = np.cumsum(new) - 1
    count = int(window[-1]) + 1 if len(window) else 0
    tokens = np.zeros((count, width), np.int64)
    routes = np.full((count, width, *table.routes.shape[1:]), -1, np.int16)
    tokens[window, within % width] = np.maximum(ids, 0)
    routes[window, within % width] = table.routes[order]
    inputs = None
    if samples is not None:
        token, place, hidden = samples
        sorted_at = np.empty(len(order), np.int64)
        sorted_at[order] = np.arange(len(order))
        at = sorted_at[token]
        inputs = RouterInputs(window=window[at], offset=within[at] % width, place=place, hidden=hidden)
    windows = Windows(model=model, tokens=tokens, request=request[new] + requests, routes=routes, inputs=inputs)
    return windows.take(np.flatnonzero(windows.known.any(2).sum(1) >= 2))
