"""Where every expert is and what it takes: the manager's books."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.budget import format_bytes
from expertier.errors import BudgetError
from expertier.residency.base import ExpertSpace, IntArray
from expertier.residency.pool import ExpertPool

ABSENT, SPARE, LOADING, RESIDENT, CANCELLING = range(5)
# SPARE: the slot still holds memory, but a load into it was given up; nobody may compute on it. So what may be loaded
# is at most SPARE.

BoolArray = NDArray[np.bool_]


class ExpertTable:
    """All experts of a model, numbered over its layers, with their states and the bytes they hold.

    Nothing here locks or moves memory: the manager calls it with its lock held.

    Parameters
    ----------
    experts, top_k : mapping of int to int
        As for :class:`~expertier.manager.OffloadManager`.
    pool : ExpertPool
        Tells what a slot of every layer takes.
    quotas : mapping of int to int
        Most bytes of the layers that have a limit of their own.
    every_layer : bool
        Whether every layer keeps some experts at any moment.

    Attributes
    ----------
    layers : list of int
        The MoE layers, ascending; `position` and `base` tell where each stands among them and which number its first
        expert has.
    layer_of : ndarray of int64, shape (N,)
        Layer position of every expert; `column` is its index within the layer and `slot_of` its bytes.
    state : ndarray of int8, shape (N,)
        One of the constants of this module.
    pins : ndarray of int32, shape (N,)
        Leases that hold each expert.
    ahead : ndarray of bool, shape (N,)
        Loaded by a prefetch and not used yet.
    filling : ndarray of bool, shape (N,)
        Loading in the background, for nobody in particular.
    used, budget : int
        Bytes held, loads under way included, and the most that may be.
    layer_bytes : dict of int to int
        Bytes held by layer.
    """

    def __init__(
        self,
        experts: Mapping[int, int],
        top_k: Mapping[int, int],
        pool: ExpertPool,
        *,
        quotas: Mapping[int, int],
        every_layer: bool,
    ) -> None:
        self.layers = sorted(experts)
        self.experts = dict(experts)
        self.top_k = dict(top_k)
        self.quotas = dict(quotas)
        self._every_layer = every_layer
        counts = np.array([experts[layer] for layer in self.layers])
        first = (np.cumsum(counts) - counts).tolist()
        self.position = {layer: position for position, layer in enumerate(self.layers)}
        self.base = dict(zip(self.layers, first, strict=True))
        self.layer_of = np.repeat(np.arange(len(self.layers)), counts)
        self.column = np.arange(int(counts.sum())) - np.repeat(first, counts)
        self._even = len(set(counts.tolist())) == 1

        self.slot_bytes = {layer: pool.slot_bytes(layer) for layer in self.layers}
        self.least_slot = min(self.slot_bytes.values())
        self.slot_of = np.array([self.slot_bytes[layer] for layer in self.layers])[self.layer_of]
        self.total_bytes = int(self.slot_of.sum())
        self._smallest = {layer: min(experts[layer], top_k[layer]) * self.slot_bytes[layer] for layer in self.layers}

        total = len(self.layer_of)
        self.state = np.zeros(total, np.int8)
        self.pins = np.zeros(total, np.int32)
        self.ahead = np.zeros(total, bool)
        self.filling = np.zeros(total, bool)
        self.used = 0
        self.budget = 0
        self.layer_bytes = dict.fromkeys(self.layers, 0)

    def __len__(self) -> int:
        return len(self.state)

    @property
    def space(self) -> ExpertSpace:
        """The experts as eviction policies see them."""
        return ExpertSpace(layer_of=self.layer_of, layers=len(self.layers))

    def owner(self, expert: int) -> tuple[int, int]:
        """Layer of an expert and its index there."""
        return self.layers[self.layer_of[expert]], int(self.column[expert])

    # ---- states

    def slice_of(self, layer: int) -> slice:
        """Numbers of a layer's experts."""
        return slice(self.base[layer], self.base[layer] + self.experts[layer])

    def absent(self) -> BoolArray:
        """Experts that are neither resident nor under way, shape ``(N,)``."""
        absent: BoolArray = self.state <= SPARE
        return absent

    def flatten(self, table: NDArray[Any]) -> NDArray[Any]:
        """Make of values of shape ``(..., layers, most experts)`` those of all experts, shape ``(..., N)``."""
        if self._even:
            return table.reshape(*table.shape[:-2], -1)
        return table[..., self.layer_of, self.column]

    def by_layer(self, flags: BoolArray) -> BoolArray:
        """Flags of all experts as a table of shape ``(layers, most experts)``."""
        if self._even:
            return flags.reshape(len(self.layers), -1)
        table = np.zeros((len(self.layers), max(self.experts.values())), bool)
        table[self.layer_of, self.column] = flags
        return table

    @property
    def complete(self) -> bool:
        """Whether every expert is resident."""
        return self.used >= self.total_bytes and bool((self.state == RESIDENT).all())

    # ---- bytes

    def take(self, layer: int) -> None:
        """An expert of the layer gets a slot."""
        self.used += self.slot_bytes[layer]
        self.layer_bytes[layer] += self.slot_bytes[layer]

    def give(self, layer: int) -> None:
        """An expert of the layer has none any more."""
        self.used -= self.slot_bytes[layer]
        self.layer_bytes[layer] -= self.slot_bytes[layer]

    def forget(self, expert: int) -> None:
        """An expert is gone, and so is its slot."""
        self.state[expert] = ABSENT
        self.ahead[expert] = False
        self.give(self.layers[self.layer_of[expert]])

    def limit(self, layer: int) -> int:
        """Most bytes that the layer may hold."""
        return min(self.budget, self.quotas.get(layer, self.budget))

    def at_quota(self, layer: int) -> bool:
        """Whether one more expert would exceed the layer's own limit."""
        return self.layer_bytes[layer] + self.slot_bytes[layer] > self.limit(layer)

    def fits(self, layer: int) -> bool:
        """Whether one more expert of the layer fits without anybody leaving."""
        return self.used + self.slot_bytes[layer] <= self.budget and not self.at_quota(layer)

    def most_needed(self, tokens: int) -> int:
        """Bytes that a layer of a step of so many tokens may need, at most the budget: more would fail anyway."""
        most = max(
            min(self.experts[layer], tokens * self.top_k[layer]) * self.slot_bytes[layer] for layer in self.layers
        )
        return min(most, self.budget)

    def floor(self) -> int:
        """Experts that each layer keeps where every layer keeps some."""
        room = self.budget - max(self.experts[layer] * self.slot_bytes[layer] for layer in self.layers)
        return max(max(self.top_k.values()), room // sum(self.slot_bytes.values()))

    def capacity(self, layer: int) -> int:
        """Most experts of the layer that can be resident at once, beside what every other layer keeps."""
        kept = 0
        if self._every_layer:
            kept = self.floor() * sum(self.slot_bytes[other] for other in self.layers if other != layer)
        return (self.limit(layer) - kept) // self.slot_bytes[layer]

    # ---- what is asked for is possible

    def check_budget(self, budget: int) -> None:
        """Raise :class:`BudgetError` when `budget` cannot hold one token's experts of some layer."""
        if self._every_layer and budget < sum(self._smallest.values()):
            raise BudgetError(
                f"A budget of {format_bytes(budget)} cannot hold the experts one token needs in every layer at once "
                f"({format_bytes(sum(self._smallest.values()))}), so steps would have to wait.",
                f"Give at least {sum(self._smallest.values())} bytes, or a finite virtual_bias.",
            )
        layer = max(self.layers, key=lambda index: self._smallest[index])
        if budget < self._smallest[layer]:
            raise BudgetError(
                f"A budget of {format_bytes(budget)} cannot hold the experts one token needs in layer {layer} "
                f"({format_bytes(self._smallest[layer])}).",
                f"Give at least {self._smallest[layer]} bytes.",
            )

    def check_quotas(self) -> None:
        """Raise :class:`BudgetError` when a quota is too small or of no MoE layer."""
        for layer, quota in self.quotas.items():
            if layer not in self._smallest:
                raise BudgetError(f"There is a quota for layer {layer}, which has no experts.", "Remove the quota.")
            if quota < self._smallest[layer]:
                raise BudgetError(
                    f"A quota of {format_bytes(quota)} cannot hold the experts one token needs in layer {layer} "
                    f"({format_bytes(self._smallest[layer])}).",
                    f"Give at least {self._smallest[layer]} bytes.",
                )

    def check_working_set(self, layer: int, wanted: IntArray) -> None:
        """Raise :class:`BudgetError` when experts that one step needs together do not fit."""
        needed = len(wanted) * self.slot_bytes[layer]
        if needed > self.limit(layer):
            raise BudgetError(
                f"Layer {layer} of this step needs {len(wanted)} experts ({format_bytes(needed)}), "
                f"the budget is {format_bytes(self.limit(layer))}.",
                "Raise the budget or process fewer tokens per step (llama.cpp: a smaller n_ubatch).",
            )
