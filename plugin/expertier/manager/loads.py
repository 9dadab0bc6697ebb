"""Loads under way: from a slot to the last byte."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from expertier.errors import ExpertLoadError
from expertier.manager.eviction import Eviction, Victims
from expertier.manager.table import CANCELLING, LOADING, RESIDENT, SPARE, ExpertTable
from expertier.residency.base import FloatArray, IntArray
from expertier.residency.pool import ExpertPool
from expertier.storage import DEMAND, ReadQueue, ReadRequest
from expertier.telemetry import Stats


class Loads:
    """Begins, counts and gives up loads; everything but :meth:`close` runs with the manager's lock held.

    Parameters
    ----------
    table : ExpertTable
        The manager's books.
    eviction : Eviction
        Makes room.
    pool : ExpertPool
        Tells what to read, and where to.
    stats : Stats
        Counts peaks, times and prefetches given up.
    queue : ReadQueue
        Executes the reads. Whoever hears from it that one has ended calls :meth:`done`.
    """

    def __init__(
        self, table: ExpertTable, eviction: Eviction, pool: ExpertPool, stats: Stats, queue: ReadQueue
    ) -> None:
        self._table = table
        self._eviction = eviction
        self._pool = pool
        self._stats = stats
        stages = max(pool.stages(layer) for layer in table.layers)
        self._pending = np.zeros((len(table), stages), np.int16)  # reads by expert and stage that have not ended
        self._requests: dict[int, list[ReadRequest]] = {}
        self._queued_at: dict[int, float] = {}
        self._errors: dict[int, BaseException] = {}
        self._queue = queue

    # ---- begin

    def begin(self, layer: int, expert: int, recycled: int | None, priority: int) -> list[ReadRequest]:
        """Give an expert a slot, that of `recycled` if not ``None``, and return the reads to :meth:`submit`."""
        table, local = self._table, expert - self._table.base[layer]
        source: tuple[int, int] | None = None
        if recycled is not None:
            source = table.owner(recycled)
            table.forget(recycled)
        table.take(layer)
        self._stats.peak_resident_bytes = max(self._stats.peak_resident_bytes, table.used)
        try:
            plan = self._pool.place(layer, local, source)
        except BaseException:
            table.give(layer)
            # Neither is counted any more, so neither may keep memory.
            self._pool.drop(layer, local)
            if source is not None:
                self._pool.drop(*source)
            raise
        self._errors.pop(expert, None)
        requests = [
            ReadRequest(
                file=read.file,
                offset=read.offset,
                view=read.view,
                needed=read.needed,
                tag=(expert, read.stage),
                priority=priority,
                check=read.check,
                prepare=read.prepare,
                transfer=read.transfer,
            )
            for read in plan
        ]
        self._pending[expert] = 0
        for read in plan:
            self._pending[expert, read.stage] += 1
        if not requests:  # the pool had the bytes at hand
            table.state[expert] = RESIDENT
            return requests
        table.state[expert] = LOADING
        self._requests[expert] = list(requests)
        self._queued_at[expert] = time.perf_counter()
        return requests

    def begin_what_fits(self, layer: int, missing: IntArray, priority: int, chances: FloatArray | None = None) -> bool:
        """Begin loads for as many of `missing` as there is room for; whether all could begin.

        With `chances`, an expert makes room only for one that is likelier to be used.
        """
        table, eviction, demanded = self._table, self._eviction, priority == DEMAND
        reads: list[list[ReadRequest]] = []
        victims: Victims | None = None
        full = partial = False
        complete = True
        try:
            for index, expert in enumerate(missing.tolist()):
                recycled: int | None = None
                if table.state[expert] == SPARE:
                    recycled = expert
                elif not table.fits(layer):
                    recycled = eviction.spare_slot(layer)
                    if recycled is None:
                        was_full, full = full, table.at_quota(layer)
                        if victims is None or full != was_full:  # a layer at its quota lives on its own
                            victims = eviction.victims(layer, demanded=demanded, least=len(missing))
                            partial = True
                        chance = np.inf if chances is None else float(chances[index])
                        recycled, fits = eviction.make_room(layer, victims, chance)
                        if not fits and partial and not (victims and victims[-1][1] >= chance):
                            victims = eviction.victims(layer, demanded=demanded)
                            partial = False
                            recycled, fits = eviction.make_room(layer, victims, chance)
                        if not fits:
                            complete = False
                            break
                reads.append(self.begin(layer, expert, recycled, priority))
        finally:
            # Also after an error: what has begun must be read, or whoever waits for it would wait for ever.
            self.submit(reads)
        return complete

    def submit(self, reads: list[list[ReadRequest]]) -> None:
        """Queue the reads of several experts.

        All experts' first stage comes before any second one: the first multiplication starts as soon as it can.
        """
        flat = [request for of_expert in reads for request in of_expert]
        flat.sort(key=lambda request: request.tag[1])
        self._queue.submit(flat)

    def promote(self, experts: IntArray) -> None:
        """Turn loads ahead of need into demanded ones."""
        for expert in experts.tolist():
            for request in self._requests[expert]:
                self._queue.promote(request)

    # ---- end

    def cancel(self, experts: Iterable[int]) -> None:
        """Give up the loads of those experts that are under way."""
        table = self._table
        for expert in experts:
            expert = int(expert)
            requests = self._requests.get(expert)
            if requests is None or table.state[expert] != LOADING:
                continue
            table.state[expert] = CANCELLING
            self._stats.prefetches_cancelled += int(table.ahead[expert])
            table.ahead[expert] = False
            for request in list(requests):
                self._queue.cancel(request)

    def cancel_idle(self) -> bool:
        """Give up all loads that no lease waits for; whether that made a slot free at once.

        Reads that were only queued end here and now: nobody is woken for them.
        """
        table = self._table
        spare = int((table.state == SPARE).sum())
        self.cancel(np.flatnonzero((table.state == LOADING) & (table.pins == 0)))
        return int((table.state == SPARE).sum()) > spare

    def done(self, request: ReadRequest, error: BaseException | None, cancelled: bool) -> bool:
        """Note that a read has ended; whether a load in the background ended with it, without an error."""
        table = self._table
        expert, stage = request.tag
        requests = self._requests[expert]
        requests.remove(request)
        self._pending[expert, stage] -= 1
        if error is not None:
            self._errors.setdefault(expert, error)
            table.ahead[expert] = False
        if error is not None or cancelled:
            table.state[expert] = CANCELLING
        if requests:
            if error is not None:
                # The rest is of no use, and a retry should not have to wait for it.
                for other in list(requests):
                    self._queue.cancel(other)
            return False
        del self._requests[expert]
        self._stats.load_seconds += time.perf_counter() - self._queued_at.pop(expert)
        table.state[expert] = RESIDENT if table.state[expert] == LOADING else SPARE
        filled = bool(table.filling[expert])
        table.filling[expert] = False
        return filled and error is None

    # ---- ask

    def unclaimed(self) -> list[int]:
        """Experts loading ahead of a need that no lease has claimed: among the few that load at all."""
        state, pins, filling = self._table.state, self._table.pins, self._table.filling
        return [one for one in self._requests if state[one] == LOADING and not pins[one] and not filling[one]]

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def stages(self) -> int:
        """Most stages in which an expert arrives."""
        return int(self._pending.shape[1])

    def pending(self, experts: IntArray, stages: int) -> bool:
        """Whether one of the experts waits for bytes of its first so many stages."""
        return bool(self._pending[experts, :stages].any())

    def failed(self, experts: IntArray) -> bool:
        """Whether one of the experts could not be read."""
        return bool(self._errors) and any(expert in self._errors for expert in experts.tolist())

    def raise_error_of(self, experts: IntArray) -> None:
        """Raise :class:`ExpertLoadError` when one of the experts could not be read."""
        if not self._errors:
            return
        for expert in experts.tolist():
            if (cause := self._errors.get(expert)) is not None:
                layer, local = self._table.owner(expert)
                raise ExpertLoadError(f"Expert {local} of layer {layer} could not be loaded: {cause}") from cause

    @property
    def bytes_read(self) -> int:
        """Bytes of all loads so far."""
        return self._queue.bytes_read

    @property
    def prefetch_bytes_read(self) -> int:
        """The part of them that was read ahead."""
        return self._queue.prefetch_bytes_read

    def close(self) -> None:
        """Stop the I/O threads; called without the lock, which their last completions take."""
        self._queue.close()
