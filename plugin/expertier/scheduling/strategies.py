"""Batchers: who of the waiting requests shares experts with those that run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import IntArray
from expertier.routing.products import times
from expertier.scheduling.base import Round
from expertier.scheduling.kept import Cosines, KeptRows, Side

_COMPARED = 64
"""Requests among which neighbours of those that wait are looked for: the first ones."""


class Similarity:
    """Keeps similar requests together for a while: whoever is close to its nearest neighbours in the batch joins.

    Neighbours and not the batch's mean: while one kind of request runs out and another takes over, the mean of the two
    is like neither. Whoever has as close neighbours among those that wait can wait for them, so that is taken off, and
    nobody is left over who is like none of the last. Paths are compared by their roots (Hellinger's distance):
    otherwise the experts that everybody uses decide.

    Parameters
    ----------
    neighbours : int
        So many count.
    regret : float
        How much those that wait count against those that run.
    """

    name = "similarity"
    least_gain = -0.05  # it looks further ahead than to the next step's experts

    def __init__(self, neighbours: int = 6, regret: float = 0.5) -> None:
        self._neighbours = neighbours
        self._regret = regret
        self._roots = KeptRows(np.sqrt)

    def choose(self, now: Round) -> IntArray:
        places = self._roots.find(now.waiting)
        usual, running = np.sqrt(now.usual), np.sqrt(now.running)
        seen = self._roots.times(places, np.concatenate([usual[None], running]))
        cosines = Cosines(usual)
        waiting = cosines.side(self._roots.squares(places), seen[:, 0])
        batch = cosines.side(np.einsum("ij,ij->i", running, running), times(running, usual))
        alike = cosines.of(seen[:, 1:], waiting, batch)
        among = self._among(cosines, places, waiting, slice(_COMPARED))
        np.fill_diagonal(among, -np.inf)
        chosen: list[int] = []
        for _ in range(min(now.room, len(places))):
            later = self._near(among)
            score = self._near(alike) - self._regret * later if alike.shape[1] else later
            score[chosen] = -np.inf
            place = int(score.argmax())
            chosen.append(place)
            known = place < among.shape[1]
            column = among[:, place] if known else self._among(cosines, places, waiting, slice(place, place + 1))
            alike = np.column_stack([alike, column])
            if known:
                among[:, place] = -np.inf
        return np.array(chosen, np.int64)

    def _among(self, cosines: Cosines, places: IntArray, waiting: Side, some: slice) -> NDArray[np.float32]:
        """Cosines of all that wait with some of them."""
        return cosines.of(self._roots.products(places, places[some]), waiting, (waiting[0][some], waiting[1][some]))

    def _near(self, alike: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean over the nearest neighbours, shape ``(candidates,)``."""
        if alike.shape[1] > self._neighbours:
            alike = np.partition(alike, -self._neighbours, axis=1)[:, -self._neighbours :]
        seen = np.isfinite(alike)
        result: NDArray[np.float32] = np.where(seen, alike, 0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
        return result


class Greedy:
    """Whoever needs the fewest experts that neither the batch uses nor memory holds joins."""

    name = "greedy"

    def __init__(self, resident_bonus: float = 0.5) -> None:
        self._bonus = resident_bonus
        self._kept = KeptRows(np.asarray)

    def choose(self, now: Round) -> IntArray:
        places = self._kept.find(now.waiting)
        price = np.ones(len(now.usual), np.float32)
        if now.resident is not None:
            price -= self._bonus * now.resident
        for path in now.running:
            price *= 1 - path
        chosen: list[int] = []
        free = np.ones(len(now.waiting), bool)
        for _ in range(min(now.room, len(now.waiting))):
            cost = self._kept.times(places, price[None])[:, 0]
            cost[~free] = np.inf
            place = int(cost.argmin())
            chosen.append(place)
            free[place] = False
            price = price * (1 - now.waiting[place])
        return np.array(chosen, np.int64)


class Balanced:
    """Splits the requests into clusters as large as the room (ExpertFlow, section 4) and lets the oldest's join."""

    name = "balanced"

    def __init__(self, rounds: int = 8) -> None:
        self._rounds = rounds
        self._kept = KeptRows(np.asarray)

    def choose(self, now: Round) -> IntArray:
        places = self._kept.find(now.waiting)
        cosines = Cosines(now.usual)
        products = self._kept.products(places, places)
        waiting = cosines.side(self._kept.squares(places), self._kept.times(places, now.usual[None])[:, 0])
        alike = cosines.of(products, waiting, waiting)
        members = np.arange(len(places))
        while len(members) > now.room:
            members = self._half(alike, members, now.room)
        return members

    def _half(self, alike: NDArray[np.float32], members: IntArray, room: int) -> IntArray:
        size = max(room, len(members) // 2)
        among = alike[np.ix_(members, members)]
        first, second = 0, int(among[0].argmin())
        for _ in range(self._rounds):
            order = np.argsort(among[second] - among[first], kind="stable")
            ours, others = order[:size], order[size:]
            medoids = (ours[among[np.ix_(ours, ours)].sum(axis=1).argmax()], second)
            if len(others):
                medoids = (medoids[0], others[among[np.ix_(others, others)].sum(axis=1).argmax()])
            if medoids == (first, second):
                break
            first, second = int(medoids[0]), int(medoids[1])
        half = ours if 0 in ours else others if len(others) >= room else ours
        return members[np.sort(half)]


class Random:
    """Any order: shows what of a difference is chance."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def choose(self, now: Round) -> IntArray:
        return self._random.permutation(len(now.waiting))[: now.room].astype(np.int64)
