"""A trace as a sequence of events: one event is the working set of one layer in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.budget import format_bytes
from expertier.errors import BudgetError, TraceTooShortError
from expertier.residency.base import IntArray
from expertier.routing.trace import Trace
from expertier.routing.trace_format import PREFILL, TraceHeader


@dataclass(frozen=True, kw_only=True)
class Events:
    """All events of a trace, in order, in columns.

    Attributes
    ----------
    header : TraceHeader
        What the trace is of.
    phase, tokens : ndarray, shape (steps,)
        0 decode, 1 prefill; tokens of each step.
    step, layer : ndarray of int64, shape (events,)
        Step and position of the layer in the header.
    route_starts : ndarray of int64, shape (events + 1,)
        Where each event's routes begin in `route_experts`.
    route_experts : ndarray of int64
        Experts within their layer, rows of top_k.
    set_starts : ndarray of int64, shape (events + 1,)
        Where each event's working set begins in `set_experts`.
    set_experts : ndarray of int64
        Experts numbered over all layers, ascending and each once within an event.
    requests, positions : ndarray of int64, shape (tokens,)
        Request of every token of every step, and its place in it, -1 if unknown.
    token_ids : ndarray of int64, shape (tokens,), or None
        The tokens, if the trace has them.
    hidden_event : ndarray of int64, shape (samples,)
        Events of which the router's input was recorded; only those of one row.
    hidden : ndarray of float16, shape (samples, hidden)
        The inputs.
    """

    header: TraceHeader
    phase: NDArray[np.uint8]
    tokens: IntArray
    step: IntArray
    layer: IntArray
    route_starts: IntArray
    route_experts: IntArray
    set_starts: IntArray
    set_experts: IntArray
    requests: IntArray
    positions: IntArray
    token_ids: IntArray | None
    hidden_event: IntArray
    hidden: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.step)

    def routes(self, event: int) -> IntArray:
        """Routes of an event, shape ``(rows, top_k)``."""
        top_k = self.header.layers[self.layer[event]].top_k
        return self.route_experts[self.route_starts[event] : self.route_starts[event + 1]].reshape(-1, top_k)

    def working_set(self, event: int) -> IntArray:
        """Experts of an event, numbered over all layers."""
        return self.set_experts[self.set_starts[event] : self.set_starts[event + 1]]

    @cached_property
    def step_starts(self) -> IntArray:
        """First event of every step, and the end, shape ``(steps + 1,)``."""
        return np.searchsorted(self.step, np.arange(len(self.phase) + 1))

    @cached_property
    def token_starts(self) -> IntArray:
        """First token of every step, and the end, shape ``(steps + 1,)``."""
        return np.concatenate([[0], np.cumsum(self.tokens)]).astype(np.int64)

    def router_input(self, event: int) -> NDArray[np.float16] | None:
        """What the router of an event saw, shape ``(hidden,)``, if it was recorded."""
        place = int(np.searchsorted(self.hidden_event, event))
        if place < len(self.hidden_event) and self.hidden_event[place] == event:
            sample: NDArray[np.float16] = self.hidden[place]
            return sample
        return None

    @cached_property
    def decode(self) -> NDArray[np.bool_]:
        """Whether each event belongs to a decode step, shape ``(events,)``."""
        result: NDArray[np.bool_] = (self.phase != PREFILL)[self.step]
        return result

    @property
    def decode_tokens(self) -> int:
        """Tokens that were decoded."""
        return int(self.tokens[self.phase != PREFILL].sum())

    @property
    def decode_steps(self) -> int:
        """Decode steps."""
        return int((self.phase != PREFILL).sum())

    @cached_property
    def base(self) -> IntArray:
        """Number of each layer's first expert, shape ``(layers,)``."""
        return _bases(self.header)

    @cached_property
    def slot_bytes(self) -> IntArray:
        """Memory of every expert, shape ``(experts,)``."""
        layers = self.header.layers
        return np.repeat([layer.slot_bytes for layer in layers], [layer.experts for layer in layers]).astype(np.int64)

    @cached_property
    def load_bytes(self) -> IntArray:
        """Bytes read to load every expert, shape ``(experts,)``."""
        return np.concatenate([layer.load_bytes() for layer in self.header.layers])

    @cached_property
    def layer_of(self) -> IntArray:
        """Position of every expert's layer, shape ``(experts,)``."""
        counts = [layer.experts for layer in self.header.layers]
        return np.repeat(np.arange(len(counts)), counts)

    @cached_property
    def least_budget(self) -> int:
        """Bytes of the largest working set."""
        return int(np.add.reduceat(self.slot_bytes[self.set_experts], self.set_starts[:-1]).max())

    def check_budget(self, budget: int) -> None:
        """Refuse a budget that some event's working set does not fit.

        Raises
        ------
        BudgetError
            With the least budget that is possible.
        """
        least = self.least_budget
        if budget < least:
            raise BudgetError(
                f"A budget of {format_bytes(budget)} cannot hold the largest working set of this trace "
                f"({format_bytes(least)}).",
                f"Give at least {least} bytes ({100 * least / self.header.total_bytes:.1f}% of all experts).",
            )


def load_events(trace: Trace, *, most_tokens: int | None = None, seen: Callable[[int], None] | None = None) -> Events:
    """Read a trace.

    Parameters
    ----------
    trace : Trace
        The trace.
    most_tokens : int, optional
        Steps after so many tokens are left out.
    seen : callable, optional
        Told the number of tokens of every block that was read.

    Raises
    ------
    TraceTooShortError
        There are fewer than two tokens, or no decode step.
    """
    header = trace.header
    columns: dict[str, list[NDArray[Any]]] = {
        name: []
        for name in (
            "phase",
            "tokens",
            "step",
            "layer",
            "size",
            "routes",
            "request",
            "position",
            "hidden_event",
            "hidden",
        )
    }
    ids: list[NDArray[Any]] | None = [] if header.tokens else None
    top_k = np.array([layer.top_k for layer in header.layers])
    steps = tokens = events = 0
    full = False
    for block in trace.blocks():
        if full:
            continue  # the notes come last
        keep = len(block.phase)
        if most_tokens is not None:
            keep = int(np.searchsorted(tokens + np.cumsum(block.step_tokens, dtype=np.int64), most_tokens, "right"))
        ran = (block.call_step < keep) & (block.call_rows > 0)  # calls are in the order of steps
        calls = np.flatnonzero(ran)
        columns["phase"].append(block.phase[:keep])
        columns["tokens"].append(block.step_tokens[:keep].astype(np.int64))
        columns["step"].append(block.call_step[calls].astype(np.int64) + steps)
        columns["layer"].append(block.call_layer[calls].astype(np.int64))
        columns["size"].append((block.call_rows[calls] * top_k[block.call_layer[calls]]).astype(np.int64))
        columns["routes"].append(
            block.experts[: block.call_starts[int((block.call_step < keep).sum())]].astype(np.int64)
        )
        count = int(block.step_tokens[:keep].sum())
        columns["request"].append(block.request[:count].astype(np.int64))
        columns["position"].append(block.position[:count].astype(np.int64))
        if ids is not None and block.token_id is not None:
            ids.append(block.token_id[:count].astype(np.int64))
        rows = np.flatnonzero(np.isin(block.hidden_call, calls) & (block.call_rows[block.hidden_call] == 1))
        columns["hidden_event"].append(np.searchsorted(calls, block.hidden_call[rows]) + events)
        columns["hidden"].append(block.hidden[rows])
        steps += keep
        tokens += count
        events += len(calls)
        if seen is not None:
            seen(int(block.step_tokens.sum()))
        full = keep < len(block.phase)
    if tokens < 2:
        held = "a single token" if tokens else "no token"
        raise TraceTooShortError(f"{trace.path} holds {held}, at least two are needed.", "Record more text.")
    columns["hidden"] = [part for part in columns["hidden"] if part.size] or columns["hidden"][
        :1
    ]  # others have no width
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    if not (joined["phase"] != PREFILL).any() or not len(joined["step"]):
        raise TraceTooShortError(f"{trace.path} has no decoded token with routes.", "Record more text.")
    route_starts = np.concatenate([[0], np.cumsum(joined["size"])])
    event_of = np.repeat(np.arange(len(joined["step"])), joined["size"])
    total = header.total_experts
    base = _bases(header)
    keys = np.unique(event_of * total + base[joined["layer"][event_of]] + joined["routes"])
    return Events(
        header=header,
        phase=joined["phase"],
        tokens=joined["tokens"],
        step=joined["step"],
        layer=joined["layer"],
        route_starts=route_starts,
        route_experts=joined["routes"],
        set_starts=np.searchsorted(keys, np.arange(len(joined["step"]) + 1) * total),
        set_experts=keys % total,
        requests=joined["request"],
        positions=joined["position"],
        token_ids=np.concatenate(ids) if ids else None,
        hidden_event=joined["hidden_event"],
        hidden=joined["hidden"],
    )


def _bases(header: TraceHeader) -> IntArray:
    counts = [layer.experts for layer in header.layers]
    return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
