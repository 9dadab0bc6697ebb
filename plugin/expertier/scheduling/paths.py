"""What requests are expected to use: known of running ones, guessed from the prompt's tokens for those that wait."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from expertier.manager import OffloadManager
from expertier.residency.base import IntArray

HALF_LIFE = 64.0
"""Tokens after which what a running request used counts half."""

TABLE_BYTES = 32 << 20
MOST_PROMPT = 256
"""Tokens of a prompt that are looked at: the last ones."""
_MOST_ROWS = 128
"""Rows of a long step that are learned from."""


def resident_experts(manager: OffloadManager, layers: Sequence[int], width: int) -> NDArray[np.float32]:
    """Show what is in memory in the form of a path: 1 for experts that are, shape ``(len(layers) * width,)``."""
    held = np.zeros((len(layers), width), np.float32)
    for place, layer in enumerate(layers):
        mask = manager.resident(layer)
        held[place, : len(mask)] = mask
    return held.reshape(-1)


class PathBook:
    """Learns which experts go with which token ids while the engine serves, and what each request uses.

    No training is needed: a request that waits is described by the mean of what its prompt's tokens used elsewhere, a
    running one by what it used itself.

    Parameters
    ----------
    layers, experts : int
        Shape of a path.
    table_bytes : int
        Memory for what tokens used. Token ids that do not fit share rows.

    Notes
    -----
    All methods are vectorised over the rows of a step and called once per step, not per layer.
    """

    def __init__(self, layers: int, experts: int, *, table_bytes: int = TABLE_BYTES) -> None:
        self.layers, self.experts = layers, experts
        self.width = layers * experts
        self._rows = max(64, min(1 << 18, table_bytes // (4 * self.width)))
        self._table: NDArray[np.float32] = np.zeros((0, self.width), np.float32)
        self._uses: NDArray[np.float32] = np.zeros(0, np.float32)
        self._total = np.zeros(self.width, np.float32)
        self._seen = 0.0
        self._paths: dict[Hashable, NDArray[np.float32]] = {}
        self._steady = 2.0 ** (-1.0 / HALF_LIFE)
        self._offset = np.arange(layers)[:, None] * experts

    @property
    def known_tokens(self) -> int:
        """Rows of the table that have been learned."""
        return int(np.count_nonzero(self._uses))

    def observe(self, requests: Sequence[Hashable], tokens: IntArray, routes: IntArray) -> None:
        """Learn from the rows of a step.

        Parameters
        ----------
        requests : sequence of hashable
            The request of each row.
        tokens : ndarray of int64, shape (rows,)
            Token ids that were fed; negative where unknown.
        routes : ndarray of int64, shape (rows, layers, top_k)
            What the router chose; negative where a layer did not run.
        """
        rows = len(tokens)
        chosen = np.zeros((rows, self.width + 1), bool)  # the last column takes what is not there
        flat = np.where(routes >= 0, routes + self._offset, self.width).reshape(rows, -1)
        chosen[np.arange(rows)[:, None], flat] = True
        chosen[:, -1] = False
        row, column = np.divmod(np.flatnonzero(chosen), self.width + 1)
        self._learn(tokens, row, column)
        # Rows of one request are neighbours, in order.
        names = list(requests)
        edges = [0, *(place for place in range(1, rows) if names[place] != names[place - 1]), rows]
        cuts = np.searchsorted(row, edges).tolist()
        for (start, stop), (first, last) in zip(itertools.pairwise(edges), itertools.pairwise(cuts), strict=True):
            self._follow(names[start], stop - start, row[first:last] - start, column[first:last])

    def _learn(self, tokens: IntArray, row: IntArray, column: IntArray) -> None:
        """Add what rows used to what their tokens did: experts `column`, each of the `row` beside it."""
        pick = np.flatnonzero(tokens >= 0)
        if len(pick) > _MOST_ROWS:
            pick = pick[:: -(-len(pick) // _MOST_ROWS)]
        places = np.full(len(tokens), -1, np.int64)
        places[pick] = self._places(tokens[pick])
        if not len(pick):
            return
        if len(self._table) <= places.max():
            size = min(self._rows, max(1024, 2 * len(self._table), int(places.max()) + 1))
            self._table = np.concatenate([self._table, np.zeros((size - len(self._table), self.width), np.float32)])
            self._uses = np.concatenate([self._uses, np.zeros(size - len(self._uses), np.float32)])
        place = places[row]
        learned = place >= 0
        np.add.at(self._table.reshape(-1), place[learned] * self.width + column[learned], np.float32(1))
        np.add.at(self._uses, places[pick], np.float32(1))
        self._total += np.bincount(column[learned], minlength=self.width)
        self._seen += len(pick)

    def _follow(self, request: Hashable, count: int, row: IntArray, column: IntArray) -> None:
        """Add so many tokens of a request, and the experts they used."""
        weights = self._steady ** np.arange(count - 1, -1, -1, dtype=np.float32)
        fresh = np.bincount(column, weights[row], self.width)
        before = self._paths.get(request)
        # Kept as a sum over tokens with a decay, its weight in the last place.
        if before is None:
            self._paths[request] = np.append(fresh, weights.sum()).astype(np.float32)
        else:
            before *= self._steady**count
            before[:-1] += fresh
            before[-1] += weights.sum()

    def _places(self, tokens: IntArray) -> IntArray:
        return tokens % self._rows

    def of_running(self, request: Hashable) -> NDArray[np.float32] | None:
        """What a request used lately, shape ``(layers * experts,)``; ``None`` before its first step."""
        path = self._paths.get(request)
        if path is None:
            return None
        result: NDArray[np.float32] = path[:-1] / path[-1]
        return result

    def of_waiting(self, request: Hashable, tokens: IntArray) -> NDArray[np.float32] | None:
        """What the tokens of a prompt used elsewhere, shape ``(layers * experts,)``; ``None`` if few were seen."""
        if not len(self._table) or not len(tokens):
            return None
        places = self._places(tokens[-MOST_PROMPT:])
        places = places[places < len(self._table)]
        places = places[self._uses[places] > 0]
        if 4 * len(places) < min(len(tokens), MOST_PROMPT):
            return None
        some, counts = np.unique(places, return_counts=True)  # texts repeat their tokens
        shares = (counts / (self._uses[some] * len(places))).astype(np.float32)
        result: NDArray[np.float32] = np.einsum("i,ij->j", shares, self._table[some])
        return result

    def usual(self) -> NDArray[np.float32]:
        """What tokens use on average, shape ``(layers * experts,)``."""
        return self._total / max(self._seen, 1.0)

    def forget(self, request: Hashable) -> None:
        """A request is over."""
        self._paths.pop(request, None)
