"""The one object an adapter talks to."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expertier.budget import format_bytes
from expertier.errors import BudgetError, ExpertLoadError, ManagerClosedError
from expertier.manager.background import Background
from expertier.manager.config import ManagerConfig, Phase
from expertier.manager.eviction import Eviction
from expertier.manager.lease import Lease
from expertier.manager.loads import Loads
from expertier.manager.table import ABSENT, CANCELLING, LOADING, RESIDENT, SPARE, ExpertTable
from expertier.residency import make_policy
from expertier.residency.base import FloatArray, ForecastListener, IntArray
from expertier.residency.pool import ExpertPool, TieredPool
from expertier.residency.uses import UseCounts
from expertier.storage import DEMAND, PREFETCH, IoScheduler, ReadQueue, ReadRequest
from expertier.telemetry import PhaseCounters, Stats

if TYPE_CHECKING:
    from expertier.routing.predictor import Forecast

logger = logging.getLogger("expertier")


class OffloadManager:
    """Keeps a bounded set of experts in memory and brings in what a step needs.

    Parameters
    ----------
    experts : mapping of int to int
        Layer index to number of routed experts, for every MoE layer.
    top_k : mapping of int to int
        Layer index to experts used per token.
    pool : ExpertPool
        The adapter's memory.
    budget : int
        Most bytes the pool may hold at any moment, loads under way included.
    config : ManagerConfig, optional
        Policy and I/O settings.

    Raises
    ------
    BudgetError
        When the budget or a quota cannot hold one token's experts of some layer.

    Notes
    -----
    All public methods may be called from several threads. Victims are never experts that a lease pins, loads under
    way are never overwritten, and an expert becomes visible to a lease only after its last byte has arrived.

    A thread releases its lease before it acquires the next or resizes: memory that a lease pins makes no room, and
    whoever needs room waits until the other threads have released theirs.
    """

    def __init__(
        self,
        *,
        experts: Mapping[int, int],
        top_k: Mapping[int, int],
        pool: ExpertPool,
        budget: int,
        config: ManagerConfig | None = None,
    ) -> None:
        self.config = config or ManagerConfig()
        self._pool = pool
        self._table = ExpertTable(
            experts,
            top_k,
            pool,
            quotas=self.config.quotas or {},
            every_layer=self.config.every_layer,
        )
        self._table.check_budget(budget)
        self._table.check_quotas()
        self._table.budget = budget
        self._policy = make_policy(self.config.policy, self._table.space, half_life=self.config.half_life)
        self._listener = self._policy if isinstance(self._policy, ForecastListener) else None
        if isinstance(pool, TieredPool):
            pool.rank_by(lambda these, layer: self._policy.keep_scores(these, self._table.position[layer]))
        self._numbers = np.arange(len(self._table))
        self._uses = UseCounts(len(self._table))
        self._warm = False  # the policy knows from an earlier run what is used often

        self._stats = Stats(total_bytes=self._table.total_bytes, total_experts=len(self._table))
        self._phase: PhaseCounters = self._stats.decode
        self._step_needs = 0  # bytes that a layer of the running step may need
        self._lock = threading.Condition()
        self._admission = threading.Lock()  # one caller at a time waits for room, the others hold complete leases
        self._leases = 0
        self._tight = False  # somebody waits for memory to become free: prefetches stay away
        self._closed = False
        self._eviction = Eviction(self._table, self._policy, pool, self._stats, every_layer=self.config.every_layer)
        self._loads = Loads(self._table, self._eviction, pool, self._stats, self._read_queue())
        self._background = Background(self._table, self._eviction, self._loads)

    def _read_queue(self) -> ReadQueue:
        """What executes the reads; the simulator has one of its own."""
        return IoScheduler(self._on_done, threads=self.config.io_threads, chunk_bytes=self.config.chunk_bytes)

    # ---- steps

    def warm_up(self) -> None:
        """Begin to fill the pool where the configuration asks for it; returns at once.

        What to fill it with must be known: everything fits, or :meth:`warm` told what is used often. Where every layer
        keeps some experts, it waits for those, which count as a prompt's.
        """
        if self.config.every_layer:
            self._phase = self._stats.prefill
            for layer in self._table.layers:
                chances = self._policy.use_probability(self._numbers[self._table.slice_of(layer)])
                self.acquire(layer, np.argsort(-chances, kind="stable")[: self._table.floor()]).release()
        with self._lock:
            if self._warm or self._everything_fits:
                self._fill()

    def wait_until_filled(self) -> None:
        """Block until nothing loads in the background: what :meth:`warm_up` began has arrived, or could not be read."""
        with self._lock:
            while self._background.busy and not self._closed:
                self._lock.wait()

    def warm(self, chances: Mapping[int, ArrayLike], tokens: float) -> None:
        """Begin with what an earlier run found.

        Parameters
        ----------
        chances : mapping of int to array_like of float, shape (experts,)
            Layer to the share of tokens that used each of its experts.
        tokens : float
            From how many tokens this is known.
        """
        flat = np.concatenate([np.asarray(chances[layer], np.float64) for layer in self._table.layers])
        with self._lock:
            self._uses.add(flat, tokens)
            self._policy.warm(flat)
            self._warm = True

    def uses(self) -> tuple[dict[int, NDArray[np.float64]], float]:
        """What :meth:`warm` takes: the share of tokens that used each expert, and of how many tokens."""
        with self._lock:
            flat, tokens = self._uses.chances(), self._uses.tokens
        return {layer: flat[self._table.slice_of(layer)] for layer in self._table.layers}, tokens

    def begin_step(self, tokens: int = 1, phase: Phase = "decode") -> None:
        """Start a forward pass over `tokens` tokens: of one sequence (prefill) or of one sequence each (decode)."""
        with self._lock:
            self._check_open()
            self._policy.advance(1 if phase == "decode" else tokens)  # the tokens of a decode batch are simultaneous
            self._eviction.begin_step()
            self._phase = self._stats.decode if phase == "decode" else self._stats.prefill
            self._phase.steps += 1
            self._phase.tokens += tokens
            self._step_needs = self._table.most_needed(tokens)
            self._fill()

    def forecast(self, forecast: Forecast) -> bool:
        """Say what a step and those after it will probably use, before it begins; only some policies listen.

        Parameters
        ----------
        forecast : Forecast
            Of one sequence, or of the step's sequences together; layers in ascending order.

        Returns
        -------
        bool
            Whether forecasts decide anything: the policy listens, and they say more than past uses do.
        """
        if self._listener is None:
            return False
        with self._lock:
            return self._listener.expect(
                self._table.flatten(forecast.now).astype(np.float64),
                self._table.flatten(forecast.soon).astype(np.float64),
            )

    def end_step(self) -> None:
        """End the forward pass: prefetches for layers that did not come are given up."""
        with self._lock:
            self._step_needs = 0
            self._loads.cancel(self._loads.unclaimed())

    def observe(self, layer: int, routes: ArrayLike) -> None:
        """Note the routes of a layer: they feed the eviction policy.

        Parameters
        ----------
        layer : int
            The layer.
        routes : array_like of int, shape (tokens, top_k) or (top_k,)
            Experts of every token, oldest token first.
        """
        table = np.asarray(routes, np.int64)
        flat = table.ravel() + self._table.base[layer]
        ages = None
        if table.ndim == 2 and len(table) > 1:
            last = 0 if self._phase is self._stats.decode else len(table) - 1
            ages = np.repeat(np.linspace(last, 0, len(table)), table.shape[1])
        with self._lock:
            self._policy.touch(flat, ages)
            self._uses.note(flat, rows := len(table) if table.ndim == 2 else 1)
            if layer == self._table.layers[0]:
                self._uses.advance(rows)

    # ---- working sets

    def acquire(self, layer: int, experts: ArrayLike, *, wait: bool = True) -> Lease:
        """Pin the experts a layer needs and load those that are absent.

        Parameters
        ----------
        layer : int
            The layer.
        experts : array_like of int, shape (n,) or (tokens, top_k)
            Expert indices within the layer, duplicates allowed except within one token's row.
        wait : bool
            Whether to return only when everything has arrived. With ``False`` the loads are under way on return
            and the caller waits stage by stage with :meth:`Lease.wait`.

        Raises
        ------
        BudgetError
            When the set does not fit the budget.
        ExpertLoadError
            When an expert could not be read, or is not one of the layer's.
        """
        chosen = np.asarray(experts, np.int64)
        # One token's experts are distinct; sorting them would be half of what a fully resident layer costs.
        wanted = (chosen[0] if chosen.ndim == 2 and len(chosen) == 1 else np.unique(chosen)) + self._table.base[layer]
        with self._lock:
            self._check_open()
            try:
                resident = (self._table.state[wanted] == RESIDENT).all()
            except IndexError:
                resident = False  # refused below, with words
            if resident:
                if self._loads:
                    self._cancel_other_prefetches(layer)
                self._phase.ready_hits += len(wanted)
                return self._pin(layer, wanted)
        with self._admission:
            lease = self._acquire_absent(layer, np.unique(wanted))
        if wait:
            try:
                lease.wait()
            except BaseException:
                lease.release()
                raise
        return lease

    def hold_all(self, tokens: int = 1, phase: Phase = "decode") -> Lease | None:
        """Begin a step with every expert pinned, when all of them are resident.

        An adapter need not stop at any layer then. The step counts as if its tokens had all chosen other experts in
        every layer, as far as there are that many. What the router chose is not observed: while all experts fit, nobody
        has to know.

        Parameters
        ----------
        tokens, phase
            As for :meth:`begin_step`.

        Returns
        -------
        Lease or None
            ``None``, and no step begun, when an expert is absent.
        """
        with self._lock:
            if not self.complete:
                return None
            self.begin_step(tokens, phase)
            table = self._table
            self._phase.ready_hits += sum(
                min(table.experts[layer], tokens * table.top_k[layer]) for layer in table.layers
            )
            return self._pin(table.layers[0], self._numbers)

    def _acquire_absent(self, layer: int, wanted: IntArray) -> Lease:
        table, loads = self._table, self._loads
        local = wanted - table.base[layer]
        if local.size and not 0 <= local[0] <= local[-1] < table.experts[layer]:
            raise ExpertLoadError(f"Layer {layer} has {table.experts[layer]} experts, asked for were {local.tolist()}.")
        with self._lock:
            self._check_open()
            table.check_working_set(layer, wanted)
            self._eviction.note(layer, len(wanted))
            state = table.state[wanted]
            waiting = wanted[state != RESIDENT]
            late = wanted[state == LOADING]
            self._phase.ready_hits += len(wanted) - len(waiting)
            self._phase.late += len(late)
            self._phase.misses += len(waiting) - len(late)
            lease = self._pin(layer, wanted, waiting)
            try:
                self._cancel_other_prefetches(layer)
                loads.promote(late)
                begun = np.zeros(len(waiting), bool)
                while True:
                    # What failed before this call is tried again; what fails during it is not, or a broken disk
                    # would be read over and over until there is room.
                    loads.raise_error_of(waiting[begun])
                    state = table.state[waiting]
                    absent = waiting[state <= SPARE]
                    complete = not absent.size or loads.begin_what_fits(layer, absent, DEMAND)
                    begun |= table.state[waiting] == LOADING
                    if not complete:
                        self._wait_for_room(layer)
                    elif (state == CANCELLING).any():
                        self._pause()
                    else:
                        return lease
            except BaseException:
                lease.release()
                raise

    def _pin(self, layer: int, wanted: IntArray, waiting: IntArray | None = None) -> Lease:
        """Lease experts, of which those of `waiting` are not there yet."""
        table = self._table
        table.pins[wanted] += 1
        self._leases += 1
        ahead = table.ahead[wanted]
        if ahead.any():
            self._stats.prefetches_used += int(ahead.sum())
            table.ahead[wanted] = False
        self._eviction.finish(layer)
        return Lease(self, layer, wanted, waiting, self._phase)

    def _release(self, experts: IntArray) -> None:
        with self._lock:
            self._table.pins[experts] -= 1
            self._leases -= 1
            self._lock.notify_all()

    def _stage_ready(self, waiting: IntArray, stage: int) -> bool:
        # An error also counts as ready: the caller then waits, and the wait raises.
        return not self._loads.pending(waiting, stage + 1) or self._loads.failed(waiting)

    def _wait(self, lease: Lease, stage: int | None) -> None:
        waiting = lease._waiting
        assert waiting is not None
        stop = self._loads.stages if stage is None else stage + 1
        started = time.perf_counter()
        with self._lock:
            while True:
                self._check_open()
                self._loads.raise_error_of(waiting)
                if not self._loads.pending(waiting, stop):
                    break
                self._lock.wait()
            lease._phase.stall_seconds += time.perf_counter() - started
        lease._stages_ready = stop
        if stop == self._loads.stages:
            lease._waiting = None

    def _pause(self) -> None:
        """Wait until a load ends or a lease is released, on the caller's time; called with the lock held."""
        started = time.perf_counter()
        self._lock.wait()
        self._phase.stall_seconds += time.perf_counter() - started
        self._check_open()

    def _wait_for_room(self, layer: int) -> None:
        """Wait until a load ends or a lease is released; give up prefetches meanwhile. Called with the lock held."""
        if self._loads.cancel_idle():
            return
        if not (self._table.state == CANCELLING).any() and self._leases <= 1:
            raise BudgetError(
                f"There is no room for another expert of layer {layer} within {format_bytes(self._table.budget)}.",
                "Raise the budget, or process fewer tokens per step.",
            )
        self._tight = True
        try:
            self._pause()
        finally:
            self._tight = False

    def _cancel_other_prefetches(self, layer: int) -> None:
        """The router has spoken: prefetches for this layer that it does not want are given up."""
        mine, layer_of = self._table.position[layer], self._table.layer_of
        self._loads.cancel([expert for expert in self._loads.unclaimed() if layer_of[expert] == mine])

    def _on_done(self, request: ReadRequest, error: BaseException | None, cancelled: bool) -> None:
        with self._lock:  # re-entrant: a cancel can complete a request at once
            if self._loads.done(request, error, cancelled):
                self._fill()
            self._lock.notify_all()

    # ---- loading ahead

    def prefetch(
        self, layer: int, experts: Sequence[int] | IntArray, probabilities: ArrayLike | None = None, *, limit: int
    ) -> int:
        """Load experts that a later layer of this step will probably need.

        A prefetch takes free room or the slot of an expert that is less likely to be used; it never evicts pinned
        experts, nor any of the experts named here.

        Parameters
        ----------
        layer : int
            The layer that will need them.
        experts : sequence of int
            Candidates within the layer, likeliest first.
        probabilities : array_like of float, optional
            Chance that each is used; ``None`` means certain.
        limit : int
            Most loads that may be under way ahead of need.

        Returns
        -------
        int
            Loads begun.
        """
        table = self._table
        local = np.asarray(experts, np.int64)
        chance = np.ones(len(local)) if probabilities is None else np.asarray(probabilities, np.float64)
        if len(local) > 1:
            first = np.sort(np.unique(local, return_index=True)[1])
            local, chance = local[first], chance[first]
        wanted = local + table.base[layer]
        with self._lock:
            self._check_open()
            if self._tight:
                return 0
            limit -= len(self._loads.unclaimed())
            absent = np.flatnonzero(table.state[wanted] <= SPARE)[: max(limit, 0)]
            if not absent.size:
                return 0
            chosen = wanted[absent]
            table.pins[wanted] += 1  # none of the named makes room for another
            try:
                self._loads.begin_what_fits(layer, chosen, PREFETCH, chance[absent])
            except ExpertLoadError as error:  # whoever really needs the expert will raise it
                logger.warning("Loading ahead for layer %d ended early: %s", layer, error)
            finally:
                table.pins[wanted] -= 1
            begun = chosen[(table.state[chosen] == LOADING) | (table.state[chosen] == RESIDENT)]
            table.ahead[begun] = True
            self._stats.prefetches += len(begun)
            self._stats.prefetches_declined += len(chosen) - len(begun)
            return len(begun)

    @property
    def _everything_fits(self) -> bool:
        return self._table.budget >= self._table.total_bytes

    def _fill(self) -> None:
        """Begin loads of the likeliest absent experts into free room, a few at a time."""
        if not self.config.fill or (self._phase is not self._stats.decode and not self._everything_fits):
            return
        table = self._table
        if table.used + table.least_slot > table.budget or self._tight or self._closed or self._background.busy:
            return
        if (table.state == ABSENT).any():
            self._background.fill(self._policy.use_probability(self._numbers), 2 * self.config.io_threads)

    @property
    def swapping(self) -> bool:
        """Whether a load in the background is under way."""
        with self._lock:
            return self._background.busy

    def swap(self, most: int, *, worth: FloatArray | None = None, margin: float = 1.0) -> int:
        """Bring in the best absent experts in place of worse resident ones, in the background.

        Parameters
        ----------
        most : int
            Most loads begun; none while earlier ones are under way.
        worth : ndarray of float64, shape (experts,), optional
            What every expert is worth, layer after layer; ``None`` is the policy's chance that it is used.
        margin : float
            How many times better than its victim an expert must be.

        Returns
        -------
        int
            Loads begun.
        """
        with self._lock:
            self._check_open()
            if self._tight or self._background.busy or not (self._table.state == ABSENT).any():
                return 0
            if worth is None:
                worth = self._policy.use_probability(self._numbers)
            begun = self._background.swap(worth, most, margin)
            self._stats.swaps += begun
            return begun

    # ---- budget, life cycle, numbers

    @property
    def budget(self) -> int:
        """The budget in bytes."""
        return self._table.budget

    def bytes_of(self, layer: int, experts: int) -> int:
        """Memory that so many experts of a layer occupy."""
        return experts * self._table.slot_bytes[layer]

    def capacity(self, layer: int) -> int:
        """Most experts of a layer that can be resident at once, beside what every other layer keeps."""
        return self._table.capacity(layer)

    def resize(self, budget: int) -> None:
        """Change the budget while the engine runs, also in the middle of a step, from any thread.

        Returns when the pool holds no more than that.

        Raises
        ------
        BudgetError
            When the new budget cannot hold one token's experts, or what a layer of the running step may need: that step
            would fail. The old one stays in force, and nothing was evicted.
        """
        self._table.check_budget(budget)
        with self._admission, self._lock:
            self._check_open()
            if budget < self._step_needs:
                raise BudgetError(
                    f"A budget of {format_bytes(budget)} cannot hold what a layer of the running step may need "
                    f"({format_bytes(self._step_needs)}).",
                    "Try again when the step has ended.",
                )
            self._table.budget = budget
            try:
                while self._table.used > self._table.budget:
                    self._tight = True
                    self._shrink()
            finally:
                self._tight = False

    def _shrink(self) -> None:
        """Give back what is free to go; wait when there is nothing."""
        table = self._table
        spare = np.flatnonzero((table.state == SPARE) & (table.pins == 0)).tolist()
        victims = spare or self._eviction.evictable(None).tolist()
        for expert in victims:
            if table.used <= table.budget:
                return
            self._stats.evictions += int(table.state[expert] == RESIDENT)
            self._eviction.drop(expert)
        if not victims and not self._loads.cancel_idle():
            self._lock.wait()
            self._check_open()

    def stats(self) -> Stats:
        """Return a snapshot of all counters."""
        with self._lock:
            self._stats.budget_bytes = self._table.budget
            self._stats.resident_bytes = self._table.used
            self._stats.resident_experts = int((self._table.state == RESIDENT).sum())
            self._stats.bytes_read = self._loads.bytes_read
            self._stats.prefetch_bytes_read = self._loads.prefetch_bytes_read
            return copy.deepcopy(self._stats)

    @property
    def idle(self) -> bool:
        """Whether nothing is being loaded."""
        return not self._loads

    @property
    def bytes_read(self) -> int:
        """Bytes of all loads so far."""
        return self._loads.bytes_read

    @property
    def misses(self) -> int:
        """Experts that were absent when they were needed, in all steps so far."""
        return self._stats.decode.misses + self._stats.prefill.misses

    @property
    def complete(self) -> bool:
        """Whether every expert is resident."""
        return self._table.complete

    def resident(self, layer: int, *, arriving: bool = False) -> NDArray[np.bool_]:
        """Which experts of a layer are resident, or with `arriving` at least on their way, shape ``(experts,)``."""
        with self._lock:
            state = self._table.state[self._table.slice_of(layer)]
            resident: NDArray[np.bool_] = state == RESIDENT
            if arriving:
                resident |= state == LOADING
        return resident

    @property
    def under_way(self) -> int:
        """Loads ahead of need that have begun and that no lease has claimed."""
        with self._lock:
            return len(self._loads.unclaimed())

    def outlook(self) -> tuple[NDArray[np.bool_], int]:
        """What loading ahead goes by, for all layers at once.

        Returns
        -------
        absent : ndarray of bool, shape (layers, most experts)
            Experts that are neither resident nor under way, layers in order.
        under_way : int
            Loads ahead of need that have begun and that no lease has claimed.
        """
        with self._lock:
            return self._table.by_layer(self._table.absent()), len(self._loads.unclaimed())

    def close(self) -> None:
        """Stop I/O and release all memory. Waiters are woken with an error. Closing twice does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
        self._loads.close()
        self._pool.close()

    def disown(self) -> None:
        """Close without touching anything, in a forked child: the I/O threads and whoever held a lock are not there."""
        self._lock = threading.Condition()
        self._admission = threading.Lock()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ManagerClosedError("The offload manager is closed.", "Load the model again.")
