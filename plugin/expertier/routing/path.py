"""The route path predictor: a light sequence model over a request's tokens and the routes of its earlier tokens.

ExpertFlow (arXiv 2410.17954) predicts a token's path through all layers before the first one runs. What is different
here: a gated linear recurrence in place of an encoder and decoder, so that a decoded token costs a few small
matrix-vector products; routes that were observed are fed back; and besides the present step the network says what the
next tokens will use. It is trained in torch (:mod:`expertier.routing.path_network`) and computed here in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from expertier.routing.history import History
from expertier.routing.predictor import HORIZONS, Chances, Forecast, RoutedModel, Scores
from expertier.routing.products import times

Array = NDArray[np.float32]

DECAYS: Final = (0.0, 0.5 ** (1 / 4), 0.5 ** (1 / 16), 0.5 ** (1 / 64))
"""By how much earlier tokens' routes count less, a token further back; 0 is the previous token alone."""
EPSILON: Final = 1e-5

_CHUNK = 256  # tokens of a prompt that are read at a time; their end can be gone back to
_RECENT = 16  # decoded tokens that can be taken back without reading anything again
_LONGEST_MEMORY = 512  # tokens after which the slowest decay has forgotten


@dataclass(frozen=True, kw_only=True)
class PathShape:
    """Sizes of the network.

    Attributes
    ----------
    vocabulary : int
        Token ids.
    layers, experts : int
        Of the model; the largest layer counts.
    width, inner, route_width, depth : int
        Numbers per token, in the last block, for an earlier token's routes; recurrent blocks.
    """

    vocabulary: int
    layers: int
    experts: int
    width: int = 192
    inner: int = 384
    route_width: int = 32
    depth: int = 2

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight."""
        w, cells = self.width, self.layers * self.experts
        found: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocabulary, w)}
        for block in range(self.depth):
            found |= {
                f"recurrences.{block}.norm": (w,),
                f"recurrences.{block}.mix.weight": (3 * w, 2 * w),
                f"recurrences.{block}.mix.bias": (3 * w,),
                f"recurrences.{block}.out.weight": (w, w),
            }
        return found | {
            "used": (cells, self.route_width),
            "norm": (w,),
            "inner.weight": (2 * self.inner, w + len(DECAYS) * self.route_width),
            "inner.bias": (2 * self.inner,),
            "outer.weight": (w, self.inner),
            "last_norm": (w,),
            "head.weight": (3 * cells, w),
            "head.bias": (3 * cells,),
            "soon_mix": (len(HORIZONS), 2),
            "soon_bias": (len(HORIZONS), cells),
            "recent": (2, len(DECAYS), cells),
        }


@dataclass
class _Memory:
    """State after some tokens: of each block what it remembers, and the last token's input to its gates."""

    length: int
    states: Array  # (depth, width)
    before: Array  # (depth, width)
    saved: dict[int, tuple[Array, Array]] = field(default_factory=dict)  # by length
    most_saved: int = 2 * _RECENT
    averaged: int = 0  # tokens whose routes are in ...
    averages: tuple[Array, Array] | None = None  # ... these: (decays, cells) and (decays, route_width)


class PathScorer:
    """Computes the network.

    Parameters
    ----------
    model : RoutedModel
        For which it was trained.
    shape : PathShape
        Sizes.
    weights : mapping of str to ndarray of float32
        As :meth:`PathShape.tensors` says.
    """

    refines = False  # before the first layer it has said all it knows

    def __init__(self, model: RoutedModel, shape: PathShape, weights: dict[str, Array]) -> None:
        self.shape = shape
        self._cells = model.shape
        self._exists = model.exists.ravel().astype(np.float32)
        self._embedding = weights["embedding.weight"]
        self._blocks = [
            tuple(
                np.ascontiguousarray(weights[f"recurrences.{block}.{name}"])
                for name in ("norm", "mix.weight", "mix.bias", "out.weight")
            )
            for block in range(shape.depth)
        ]
        self._used = weights["used"]
        self._inner = (weights["norm"], weights["inner.weight"], weights["inner.bias"], weights["outer.weight"])
        # The norm's weights are folded into the head.
        self._head = np.ascontiguousarray(weights["head.weight"] * weights["last_norm"])
        self._head_bias = weights["head.bias"]
        self._soon_mix, self._soon_bias = weights["soon_mix"], weights["soon_bias"]
        self._recent = np.ascontiguousarray(weights["recent"])
        self._decays = np.array(DECAYS, np.float32)[:, None]
        self._base = (np.arange(shape.layers) * shape.experts)[:, None]

    def remember(self) -> _Memory:
        zeros = np.zeros((self.shape.depth, self.shape.width), np.float32)
        return _Memory(length=0, states=zeros, before=zeros.copy())

    def forecast(self, memory: _Memory, history: History) -> Forecast:
        x = self._read(memory, history)
        recent, told = self._tell(memory, history)
        norm, weight, bias, outer = self._inner
        hidden = times(weight, np.concatenate([_normed(x) * norm, told.ravel()]))
        hidden += bias
        value, gate = hidden[: self.shape.inner], hidden[self.shape.inner :]
        x = x + times(outer, value * _silu(gate))
        heads = times(self._head, _normed(x))
        heads += self._head_bias
        heads = heads.reshape(3, -1)
        heads[1:] += np.einsum("hdc,dc->hc", self._recent, recent)
        logits = np.empty((1 + len(HORIZONS), heads.shape[1]), np.float32)
        logits[0] = heads[0]
        np.matmul(self._soon_mix, heads[1:], out=logits[1:])
        logits[1:] += self._soon_bias
        chances = sigmoid(logits)
        chances *= self._exists
        shaped = chances.reshape(-1, *self._cells)
        return Forecast(now=shaped[0], soon=shaped[1:])

    def refine(
        self, memory: _Memory, history: History, forecast: Forecast, observed: int, scores: Scores | None
    ) -> Chances:
        return forecast.now

    # ---- tokens

    def _read(self, memory: _Memory, history: History) -> Array:
        """Bring the recurrences up to the last token and return its numbers, shape ``(width,)``."""
        first = history.step
        if memory.length != first:
            self._go_back(memory, first)
        x = np.empty(0, np.float32)
        for start in range(memory.length, history.length, _CHUNK):
            ids = history.tokens[start : start + _CHUNK]
            x = self._advance(memory, np.clip(ids, 0, self.shape.vocabulary - 1))
            memory.saved[memory.length] = (memory.states.copy(), memory.before.copy())
        if len(memory.saved) > memory.most_saved:
            # Only the last few of the decoded tokens can be taken back cheaply, and one in so many before them.
            kept: dict[int, tuple[Array, Array]] = {}
            last = 0
            for length, saved in sorted(memory.saved.items()):
                if length > memory.length - _RECENT or length - last >= _CHUNK:
                    kept[length], last = saved, length
            memory.saved = kept
            memory.most_saved = len(kept) + 2 * _RECENT
        return x

    def _go_back(self, memory: _Memory, first: int) -> None:
        memory.saved = {length: saved for length, saved in memory.saved.items() if length <= first}
        memory.length = max(memory.saved, default=0)
        if memory.length:
            states, before = memory.saved[memory.length]
            memory.states, memory.before = states.copy(), before.copy()
        else:
            memory.states, memory.before = np.zeros_like(memory.states), np.zeros_like(memory.before)
        memory.averages = None

    def _advance(self, memory: _Memory, ids: NDArray[np.int64]) -> Array:
        x = self._embedding[ids]
        if len(ids) == 1:
            return self._advance_one(memory, x[0])
        for place, (norm, mix, bias, out) in enumerate(self._blocks):
            normed = _normed(x) * norm
            before = np.concatenate([memory.before[place][None], normed[:-1]])
            gates = times(mix, np.concatenate([normed, before], 1)) + bias
            gate, value, outlet = np.split(gates, 3, axis=1)
            gate = sigmoid(gate)
            keep, states = 1.0 - gate, gate * value
            state = memory.states[place]
            for row in range(len(states)):
                state = states[row] = states[row] + keep[row] * state
            memory.states[place] = state
            memory.before[place] = normed[-1]
            x = x + times(out, states * _silu(outlet))
        memory.length += len(ids)
        last: Array = x[-1]
        return last

    def _advance_one(self, memory: _Memory, x: Array) -> Array:
        width = self.shape.width
        for place, (norm, mix, bias, out) in enumerate(self._blocks):
            normed = _normed(x) * norm
            gates = times(mix, np.concatenate([normed, memory.before[place]]))
            gates += bias
            gate = sigmoid(gates[:width])
            state = memory.states[place]
            state += gate * (gates[width : 2 * width] - state)
            memory.before[place] = normed
            x = x + times(out, state * _silu(gates[2 * width :]))
        memory.length += 1
        return x

    # ---- routes of earlier tokens

    def _tell(self, memory: _Memory, history: History) -> tuple[Array, Array]:
        """Bring the decaying averages up to the token before this step's last one and return them."""
        upto = history.length - 1
        if memory.averages is None or upto - memory.averaged != 1:
            recent, told = self._average(history, upto)
        else:
            recent, told = memory.averages
            cells = self._cells_of(history.routes[upto - 1])
            recent *= self._decays
            told *= self._decays
            if cells.size:
                fresh = 1.0 - self._decays
                recent[:, cells] += fresh
                told += fresh * self._used[cells].sum(0)
        memory.averaged = upto
        # The routes of a step of several tokens become known only after it, so that the next one begins anew.
        memory.averages = (recent, told) if history.length - history.step == 1 else None
        return recent, told

    def _average(self, history: History, upto: int) -> tuple[Array, Array]:
        first = max(0, upto - _LONGEST_MEMORY)
        routes = history.routes[first:upto]
        ages = np.arange(len(routes) - 1, -1, -1, dtype=np.float32)
        weights = (1.0 - self._decays) * self._decays**ages
        recent = np.zeros((len(DECAYS), self._cells[0] * self._cells[1]), np.float32)
        rows, places, ranks = np.nonzero(routes >= 0)
        cells = self._base[places, 0] + routes[rows, places, ranks]
        for decay in range(len(DECAYS)):
            recent[decay] = np.bincount(cells, weights[decay, rows], recent.shape[1])
        return recent, recent @ self._used

    def _cells_of(self, routes: NDArray[np.int16]) -> NDArray[np.int64]:
        cells = (routes + self._base).ravel()
        return cells if routes.min() >= 0 else cells[(routes >= 0).ravel()]


def _normed(x: Array) -> Array:
    mean = np.einsum("...i,...i->...", x, x) / x.shape[-1]
    normed: Array = x / np.sqrt(mean + EPSILON)[..., None]
    return normed


def sigmoid(x: Array) -> Array:
    """Return chances of log-odds."""
    # By tanh: exp overflows for large arguments and would warn.
    half: Array = np.tanh(0.5 * x)
    half += 1.0
    half *= 0.5
    return half


def _silu(x: Array) -> Array:
    return x * sigmoid(x)
