"""Which sequence of the context holds which tokens, and how many cells of its KV memory are free."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

_NOBODY = -1


class KvRoom:
    """Bookkeeping over llama.cpp's unified KV memory, kept equal to it call by call.

    A slot is one of the context's sequences. Slots share the cells of a common prefix, and a slot whose request is over
    keeps its cells for a later prompt that begins alike, until somebody needs the room.

    Parameters
    ----------
    memory : llama_memory_t
        The context's memory.
    cells : int
        Tokens it has room for.
    slots : int
        Sequences it holds.
    sharing : bool
        Whether a prefix can be kept: not in models with a recurrent state, which is that of the last token only.

    Attributes
    ----------
    held : list of list of int
        For every slot the tokens whose keys and values it holds.
    cells : int
        Tokens the memory has room for.
    """

    def __init__(self, memory: Any, *, cells: int, slots: int, sharing: bool) -> None:
        self._memory = memory
        self.sharing = sharing
        self.cells = cells
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self._cells_of: list[list[int]] = [[] for _ in range(slots)]
        self._users = np.zeros(cells, np.int32)
        self._unused = list(range(cells))
        self._taken = [False] * slots
        self._last_use = [0] * slots
        self._clock = itertools.count(1)

    @property
    def free(self) -> int:
        """Cells that hold nothing."""
        return len(self._unused)

    def available(self) -> int:
        """Cells that hold nothing, or only what finished requests left behind."""
        if all(self._taken):
            return self.free
        in_use = np.zeros(self.cells, bool)
        for slot in range(len(self.held)):
            if self._taken[slot]:
                in_use[self._cells_of[slot]] = True
        return self.cells - int(in_use.sum())

    def match(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The slot that holds the longest beginning of `tokens`, and how many tokens that is, at most all but one.

        The last token is always computed anew: somebody wants its logits.
        """
        best, length = _NOBODY, 0
        if self.sharing:
            for slot, held in enumerate(self.held):
                if (common := common_length(held, tokens, len(tokens) - 1)) > length:
                    best, length = slot, common
        return best, length

    def take(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Find a slot for `tokens`, with as much of their beginning as some slot holds.

        Returns
        -------
        slot, length : int
            The slot and how many tokens it holds already; ``None`` when all slots are taken.
        """
        idle = [slot for slot, taken in enumerate(self._taken) if not taken]
        if not idle:
            return None
        source, length = self.match(tokens)
        slot = min(idle, key=self._last_use.__getitem__)
        if source in idle and 2 * length >= len(self.held[source]):
            slot = source  # little is lost by cutting it
        if slot != source:
            self._forget(slot)
            if length:
                self._copy(source, slot, length)
        else:
            self.cut(slot, length)
        self._taken[slot] = True
        return slot, len(self.held[slot])

    def share(self, source: int, slot: int, length: int) -> None:
        """Give `slot` the first `length` tokens of another slot in place of what it holds."""
        self._forget(slot)
        self._copy(source, slot, length)

    def grow(self, slot: int, tokens: Sequence[int]) -> None:
        """Note that the keys and values of `tokens` were computed; there must be room."""
        count = len(tokens)
        cells = self._unused[len(self._unused) - count :]
        assert len(cells) == count
        del self._unused[len(self._unused) - count :]
        self._users[cells] = 1
        self._cells_of[slot] += cells
        self.held[slot] += tokens

    def cut(self, slot: int, length: int) -> int:
        """Forget all tokens of a slot behind the first `length`, computed or half computed; return how many stay."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1):
            length = 0  # a recurrent state cannot go back
            llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        gone = self._cells_of[slot][length:]
        if gone:
            self._users[gone] -= 1
            self._unused += [cell for cell in gone if not self._users[cell]]
            del self._cells_of[slot][length:]
            del self.held[slot][length:]
        return length

    def leave(self, slot: int) -> None:
        """The slot's request is over; what it holds stays while there is room."""
        self._taken[slot] = False
        self._last_use[slot] = next(self._clock)
        if not self.sharing:
            self._forget(slot)

    def reclaim(self) -> bool:
        """Forget what the request that ended first left behind; whether there was anything."""
        idle = [slot for slot, taken in enumerate(self._taken) if not taken and self.held[slot]]
        if not idle:
            return False
        self._forget(min(idle, key=self._last_use.__getitem__))
        return True

    def _forget(self, slot: int) -> None:
        self.cut(slot, 0)

    def _copy(self, source: int, slot: int, length: int) -> None:
        llama_cpp.llama_memory_seq_cp(self._memory, source, slot, 0, length)
        cells = self._cells_of[source][:length]
        self._users[cells] += 1
        self._cells_of[slot] = cells
        self.held[slot] = self.held[source][:length]


def common_length(left: Sequence[int], right: Sequence[int], most: int) -> int:
    """How many tokens two sequences have in common at their beginning, at most `most`."""
    limit = max(0, min(len(left), len(right), most))
    if left[:limit] == right[:limit]:
        return limit
    return next(index for index in range(limit) if left[index] != right[index])
