"""Who joins the batch next: what a batcher proposes, within a bound on unfairness that nothing can break."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import IntArray
from expertier.scheduling.base import Batcher, Round
from expertier.scheduling.fairness import Fairness
from expertier.scheduling.fcfs import FirstCome
from expertier.scheduling.paths import MOST_PROMPT, PathBook
from expertier.scheduling.together import Together
from expertier.scheduling.worth import LEAST_GAIN, Worth

logger = logging.getLogger("expertier")

_MOST_COMPARED = 256
"""Requests that a batcher chooses among: the first ones, so that a decision costs no more however many wait."""
_REFRESH_TOKENS = 1 << 22  # tokens times width that are looked up again in one proposal
_REFRESH_GROWTH = 1.25


@dataclass(slots=True)
class _Waiting:
    request: Hashable
    priority: int
    arrived: int
    tokens: IntArray
    due: int  # admissions after which it is its turn
    path: NDArray[np.float32] | None = None
    learned: int = 0  # tokens the book knew when the path was made
    overtaken: int = 0
    turn: tuple[int, float] | None = None  # step and time

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrived


@dataclass
class AdmissionStats:
    """What an admission did.

    Attributes
    ----------
    joined, overtakes : int
        Requests that joined, and how often one joined before another that had arrived earlier.
    most_overtaken : int
        The same, of the request that was overtaken most.
    forced : int
        Times a limit of fairness decided.
    held : int
        Steps for which a place stayed empty, so that prompts were computed together.
    failures : int
        Times the batcher failed.
    """

    joined: int = 0
    overtakes: int = 0
    most_overtaken: int = 0
    forced: int = 0
    held: int = 0
    failures: int = 0


class Admission:
    """Keeps the requests that wait and says who should join.

    Parameters
    ----------
    batcher : Batcher, optional
        Who proposes; first come, first served if not given.
    book : PathBook, optional
        Where paths come from; without it nothing is known of anybody and the order is that of arrival.
    fairness : Fairness
        Limits.
    worth : Worth, optional
        Decides whether regrouping gains; measures it if not given.
    clock : callable
        Seconds, for the limit in seconds.

    Notes
    -----
    An engine calls :meth:`arrive` for every request, :meth:`propose` when it has room, :meth:`joined` for each request
    it really started, :meth:`observe` and :meth:`step` once per step, and :meth:`leave` when a request is over, whether
    it waited or ran. A batcher that raises or answers nonsense is said once and replaced by the order of arrival.
    """

    def __init__(
        self,
        batcher: Batcher | None = None,
        book: PathBook | None = None,
        *,
        fairness: Fairness | None = None,
        worth: Worth | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batcher: Batcher = batcher or FirstCome()
        self.book = book
        self.fairness = fairness or Fairness()
        self.worth = worth or Worth()
        self.together = Together()
        self.stats = AdmissionStats()
        self._clock = clock
        self._waiting: dict[Hashable, _Waiting] = {}
        self._ranks: dict[int, int] = {}  # how many of them have each priority
        self._running: dict[Hashable, None] = {}
        self._arrivals = self._steps = 0
        self._held: tuple[int, float] | None = None  # proposals with an empty place in a row, and since when

    @property
    def in_order(self) -> bool:
        """Whether requests are served in the order of arrival whatever they use: nobody has to observe anything."""
        return self.book is None or isinstance(self.batcher, FirstCome)

    @property
    def compares(self) -> bool:
        """Whether :meth:`propose` would compare requests now: only then has anybody to know what is resident."""
        return len(self._waiting) > 1 and not self.in_order and self.worth.on

    # ---- requests come and go

    def arrive(self, request: Hashable, tokens: Iterable[int] = (), *, priority: int = 0) -> None:
        """Note a request that wants to run.

        Parameters
        ----------
        request : hashable
            The engine's name of it; a name that waits already is ignored.
        tokens : iterable of int
            Its prompt.
        priority : int
            Smaller goes first, whatever else speaks for others.
        """
        if request in self._waiting:
            return
        self._running.pop(request, None)  # one that was preempted waits again
        prompt = np.fromiter(tokens, np.int64)
        entry = _Waiting(request, priority, self._arrivals, prompt, self.stats.joined)
        self._arrivals += 1
        entry.due += sum(count for rank, count in self._ranks.items() if rank <= priority)
        self._ranks[priority] = self._ranks.get(priority, 0) + 1
        self._waiting[request] = entry
        if not self.in_order and len(self._waiting) <= _MOST_COMPARED:  # others are looked up when it is their turn
            try:
                self._look_up(entry)
            except Exception as error:
                self.give_up(error)

    def joined(self, request: Hashable) -> None:
        """Note that a request runs now."""
        entry = self._take(request)
        self._running[request] = None
        if entry is None:
            return
        self.stats.joined += 1
        self.together.joined()
        now: tuple[int, float] | None = None
        for other in self._waiting.values():
            if other.priority == entry.priority and other.arrived < entry.arrived:
                other.overtaken += 1
                self.stats.overtakes += 1
                self.stats.most_overtaken = max(self.stats.most_overtaken, other.overtaken)
            if other.turn is None and self.stats.joined > other.due:
                now = now or (self._steps, self._clock())
                other.turn = now

    def leave(self, request: Hashable) -> None:
        """Forget a request that is over or was cancelled; one that is unknown is ignored."""
        entry = self._take(request)
        if entry is not None:
            for other in self._waiting.values():
                if other.order > entry.order:
                    other.due -= 1
        if request in self._running:
            del self._running[request]
            self.together.left()
        if self.book is not None:
            self.book.forget(request)

    def _take(self, request: Hashable) -> _Waiting | None:
        """Let a request wait no longer; ``None`` if it did not."""
        entry = self._waiting.pop(request, None)
        if entry is not None:
            self._ranks[entry.priority] -= 1
            if not self._ranks[entry.priority]:
                del self._ranks[entry.priority]
        return entry

    def waiting(self) -> list[Hashable]:
        """Requests that wait, first come first."""
        return [entry.request for entry in sorted(self._waiting.values(), key=lambda entry: entry.order)]

    # ---- what the engine sees of the model

    def observe(self, requests: Sequence[Hashable], tokens: IntArray, routes: IntArray) -> None:
        """Learn from a step; see :meth:`PathBook.observe`."""
        if self.book is None or self.in_order:
            return
        try:
            self.book.observe(requests, tokens, routes)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Serve requests in order of arrival from now on, because something failed that regrouping needs."""
        if not self.stats.failures:
            logger.warning(
                "Requests are served in order of arrival from now on: regrouping (%s) failed: %r",
                self.batcher.name,
                error,
            )
        self.stats.failures += 1
        self.batcher = FirstCome()

    def step(self, tokens: int = 0, loads: int = 0) -> None:
        """Let a step pass.

        Parameters
        ----------
        tokens : int
            Of a step in which all requests decode; 0 for others, which say nothing about who should run together.
        loads : int
            Experts it loaded.
        """
        self._steps += 1
        self.together.step(tokens, loads)
        if tokens:
            self.worth.step(tokens, loads)

    # ---- the decision

    def holds(self, room: int) -> bool:
        """Say whether places should stay empty for this step; to be asked once per step, before :meth:`propose`.

        That is so where requests are compared anyway, while somebody runs, and while as many as should join together
        wait but have no room: for no longer than `fairness` allows, and not if anybody is overdue.

        Parameters
        ----------
        room : int
            Requests that may join.
        """
        size = self.together.size(room + len(self._running)) if self.compares else 1
        if not 0 < room < size or not self._running or not self._may_hold(size):
            self._held = None
            return False
        count, since = self._held or (0, self._clock())
        self._held = count + 1, since
        self.stats.held += 1
        return True

    def _may_hold(self, size: int) -> bool:
        urgent = min(entry.priority for entry in self._waiting.values())
        first = [entry for entry in self._waiting.values() if entry.priority == urgent]
        count, since = self._held or (0, self._clock())
        if len(first) < size or count >= self.fairness.held or self._clock() - since >= self.fairness.seconds:
            return False
        now = (self._steps, self._clock())
        return not any(self._overdue(entry, now) for entry in first)

    def propose(self, room: int, *, resident: NDArray[np.float32] | None = None) -> list[Hashable]:
        """Say who should join, the first to join first.

        Parameters
        ----------
        room : int
            Requests that may join.
        resident : ndarray of float32, shape (layers * experts,), optional
            1 for experts in memory.

        Returns
        -------
        list
            As many as there is room for and as wait. Nothing changes before :meth:`joined`.
        """
        queue = sorted(self._waiting.values(), key=lambda entry: entry.order)
        if room <= 0 or not queue:
            return []
        if not self.compares:
            return [entry.request for entry in queue[:room]]
        chosen: list[_Waiting] = []
        while queue and len(chosen) < room:
            group = [entry for entry in queue if entry.priority == queue[0].priority]
            queue = queue[len(group) :]
            chosen += self._from(group, chosen, room - len(chosen), resident)
        return [entry.request for entry in chosen]

    def _from(
        self, group: list[_Waiting], chosen: list[_Waiting], room: int, resident: NDArray[np.float32] | None
    ) -> list[_Waiting]:
        """Choose among requests of one priority, in order of arrival."""
        if len(group) <= room:
            return group  # all of them join
        now = (self._steps, self._clock())
        overdue = np.array([self._overdue(entry, now) for entry in group])
        forced = [entry for entry, late in zip(group, overdue.tolist(), strict=True) if late][:room]
        free = [entry for entry, late in zip(group, overdue.tolist(), strict=True) if not late]
        self.stats.forced += len(forced)
        wish = self._wish(free, chosen + forced, room - len(forced), resident) if len(forced) < room else []
        return forced + self._within_bounds(free, wish, room - len(forced))

    def _overdue(self, entry: _Waiting, now: tuple[int, float]) -> bool:
        if entry.turn is None:
            return False
        return now[0] - entry.turn[0] >= self.fairness.steps or now[1] - entry.turn[1] >= self.fairness.seconds

    def _wish(
        self, free: list[_Waiting], chosen: list[_Waiting], room: int, resident: NDArray[np.float32] | None
    ) -> list[int]:
        """What the batcher wants: places in `free`, each once."""
        assert self.book is not None
        free = free[: max(_MOST_COMPARED, 2 * room)]
        try:
            self._refresh(free)
            usual = self.book.usual()
            running = [self.book.of_running(request) for request in self._running]
            rows = [path for path in running if path is not None]
            rows += [entry.path for entry in chosen if entry.path is not None]
            now = Round(
                waiting=[usual if entry.path is None else entry.path for entry in free],
                running=np.stack(rows) if rows else np.zeros((0, self.book.width), np.float32),
                usual=usual,
                resident=resident,
                room=room,
            )
            answer = [int(place) for place in self.batcher.choose(now)]
            if len(set(answer)) != len(answer) or any(not 0 <= place < len(free) for place in answer):
                raise ValueError(f"it named {answer} of {len(free)} requests")
            least = getattr(self.batcher, "least_gain", LEAST_GAIN)
            return answer if self.worth.mode == "on" or _gain(now, answer) >= least else []
        except Exception as error:
            self.give_up(error)
            return []

    def _look_up(self, entry: _Waiting) -> None:
        assert self.book is not None
        entry.path = self.book.of_waiting(entry.request, entry.tokens)
        entry.learned = self.book.known_tokens

    def _refresh(self, free: list[_Waiting]) -> None:
        """Guess paths again when the book has learned a quarter more, of as many requests as take little time."""
        assert self.book is not None
        known = self.book.known_tokens
        left = _REFRESH_TOKENS
        for entry in free:
            if known > entry.learned * _REFRESH_GROWTH:
                self._look_up(entry)
                left -= self.book.width * max(1, min(len(entry.tokens), MOST_PROMPT))
                if left < 0:
                    break

    def _within_bounds(self, free: list[_Waiting], wish: list[int], room: int) -> list[_Waiting]:
        """Follow the wish as long as nobody is overtaken too often; then the one who was goes first."""
        left = list(range(len(free)))
        overtaken = np.array([entry.overtaken for entry in free])
        wanted = list(wish)
        chosen: list[_Waiting] = []
        while left and len(chosen) < room:
            place = wanted[0] if wanted else left[0]
            before = [other for other in left if other < place]
            full = [other for other in before if overtaken[other] >= self.fairness.overtaken]
            if full:
                place = full[0]
                self.stats.forced += 1
            if place in wanted:
                wanted.remove(place)
            overtaken[[other for other in left if other < place]] += 1
            left.remove(place)
            chosen.append(free[place])
        return chosen


def _gain(now: Round, answer: list[int]) -> float:
    """Part of the experts expected beyond those in use and in memory that an answer saves against order of arrival."""
    price = np.ones(len(now.usual), np.float32) if now.resident is None else 1 - now.resident
    for path in now.running:
        price = price * (1 - path)
    needs = [
        float(np.einsum("i,i->", price, 1 - np.prod([1 - now.waiting[place] for place in places], axis=0)))
        for places in (range(len(answer)), answer)
    ]
    return 1 - needs[1] / needs[0] if needs[0] > 0 else 0.0
