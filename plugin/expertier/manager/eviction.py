"""Who makes room for whom."""

from __future__ import annotations

import numpy as np

from expertier.manager.table import RESIDENT, SPARE, ExpertTable
from expertier.residency.base import EvictionPolicy, FloatArray, IntArray
from expertier.residency.floor import spare_every_layer
from expertier.residency.pool import ExpertPool
from expertier.telemetry import Stats

_SWEEP_FROM = 0.5  # share of a layer's experts in one working set from which a step counts as sweeping through layers

Victims = list[tuple[int, float]]
"""Experts that may make room with what each is worth, best victim last."""


class Eviction:
    """Chooses victims by the policy and the running step; everything runs with the manager's lock held.

    Parameters
    ----------
    table : ExpertTable
        The manager's books.
    policy : EvictionPolicy
        Ranks experts.
    pool : ExpertPool
        Whose memory is given back.
    stats : Stats
        Counts evictions.
    every_layer : bool
        Whether every layer keeps some experts.
    """

    def __init__(
        self, table: ExpertTable, policy: EvictionPolicy, pool: ExpertPool, stats: Stats, *, every_layer: bool
    ) -> None:
        self._table = table
        self._policy = policy
        self._pool = pool
        self._stats = stats
        self._every_layer = every_layer
        self._finished = np.zeros(len(table.layers), bool)  # layers that this step is through with
        self._sweeping = False  # this step needs most experts of every layer

    def begin_step(self) -> None:
        """No layer has come yet."""
        self._finished[:] = False
        self._sweeping = False

    def note(self, layer: int, wanted: int) -> None:
        """A layer of the running step wants so many experts."""
        experts = self._table.experts[layer]
        self._sweeping |= wanted > self._table.top_k[layer] and wanted >= _SWEEP_FROM * experts

    def finish(self, layer: int) -> None:
        """The running step needs nothing but its lease of this layer any more."""
        self._finished[self._table.position[layer]] = True

    def evictable(
        self,
        layer: int | None,
        least: int | None = None,
        *,
        worth: FloatArray | None = None,
        demanded: bool = False,
    ) -> IntArray:
        """Resident, unpinned experts that may make room for `layer` (``None``: for nobody), best victims first.

        With `least` only the first so many, and those that are as good as the last of them: sorting thousands to take
        two cost more than all else a miss costs here. With `worth` (of all experts) that counts and not the policy.
        `demanded`: a step has pinned what it needs, and waits.
        """
        table = self._table
        position = 0
        usable = (table.state == RESIDENT) & (table.pins == 0)
        if layer is not None:
            position = table.position[layer]
            if table.at_quota(layer):
                usable &= table.layer_of == position
        candidates = np.flatnonzero(usable)
        scores = self._policy.keep_scores(candidates, position) if worth is None else worth[candidates]
        if self._every_layer:
            # What a step is about to have of a layer takes the place of what that layer kept.
            kept = (table.state == RESIDENT) | (table.pins > 0) if demanded else table.state == RESIDENT
            spared = spare_every_layer(table.layer_of, kept, table.floor(), candidates, scores)
            candidates, scores = candidates[spared], scores[spared]
        if self._sweeping:
            # A step of many tokens touches most experts of every layer: those of layers still to come would be read
            # again within this very step, so layers already finished give first.
            order: IntArray = np.lexsort((scores, ~self._finished[table.layer_of[candidates]]))
            return candidates[order]
        if least is not None and least < len(candidates):
            first = np.flatnonzero(scores <= np.partition(scores, least)[least])
            candidates, scores = candidates[first], scores[first]
        return candidates[np.argsort(scores, kind="stable")]

    def victims(self, layer: int, *, demanded: bool, least: int | None = None) -> Victims:
        """Experts that may make room for `layer`; for a demand they are worth nothing."""
        victims = self.evictable(layer, least, demanded=demanded)[::-1]
        if demanded:
            worth = np.zeros(len(victims))
        else:
            worth = self._policy.use_probability(victims)
            if self._sweeping:  # layers still to come need all of theirs within this step
                worth[~self._finished[self._table.layer_of[victims]]] = np.inf
        return list(zip(victims.tolist(), worth.tolist(), strict=True))

    def victims_worth(self, layer: int, worth: FloatArray) -> Victims:
        """Experts that may make room for `layer` where `worth` (of all experts) counts and not the policy."""
        victims = self.evictable(layer, worth=worth)[::-1]
        return list(zip(victims.tolist(), worth[victims].tolist(), strict=True))

    def spare_slot(self, layer: int) -> int | None:
        """An expert whose load was given up and whose slot `layer` can take over; other sizes are dropped."""
        table = self._table
        for spare in np.flatnonzero(table.state == SPARE).tolist():
            if table.at_quota(layer) and table.layer_of[spare] != table.position[layer]:
                continue
            if table.pins[spare]:
                continue  # somebody is about to load into it
            if table.slot_of[spare] == table.slot_bytes[layer]:
                return int(spare)
            self.drop(spare)
        return None

    def make_room(self, layer: int, victims: Victims, chance: float) -> tuple[int | None, bool]:
        """Evict until one more expert of `layer` fits. A victim of the same size is handed over instead of dropped.

        Nothing is evicted when all that may go is not enough, or when something worth more than `chance` had to go.
        """
        table, slot = self._table, self._table.slot_bytes[layer]
        leaving: Victims = []
        freed = 0
        while table.used + slot - freed > table.budget or table.at_quota(layer):
            if not victims or victims[-1][1] >= chance:
                victims.extend(reversed(leaving))
                return None, False
            victim, worth = victims.pop()
            if table.slot_of[victim] == slot:
                victims.extend(reversed(leaving))
                self._stats.evictions += 1
                return victim, True
            leaving.append((victim, worth))
            freed += int(table.slot_of[victim])
        self._stats.evictions += len(leaving)
        for victim, _ in leaving:
            self.drop(victim)
        return None, True

    def drop(self, expert: int) -> None:
        """Give an expert's memory back."""
        self._pool.drop(*self._table.owner(expert))
        self._table.forget(expert)
