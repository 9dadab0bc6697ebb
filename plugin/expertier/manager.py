"""The offload manager: the one object an adapter talks to."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expertier.budget import format_bytes
from expertier.errors import BudgetError, ExpertLoadError, ManagerClosedError
from expertier.residency import make_policy
from expertier.residency.base import ExpertSpace, FloatArray, ForecastListener, IntArray
from expertier.residency.floor import spare_every_layer
from expertier.residency.pool import ExpertPool, TieredPool
from expertier.residency.uses import UseCounts
from expertier.storage import DEMAND, PREFETCH, IoScheduler, ReadRequest
from expertier.telemetry import PhaseCounters, Stats

if TYPE_CHECKING:
    from expertier.routing.predictor import Forecast

logger = logging.getLogger("expertier")

_SWEEP_FROM = 0.5  # share of a layer's experts in one working set from which a step counts as sweeping through layers

_ABSENT, _SPARE, _LOADING, _RESIDENT, _CANCELLING = range(5)
# _SPARE: the slot still holds memory, but a load into it was given up; nobody may compute on it. So what may be loaded
# is at most _SPARE.

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, kw_only=True)
class ManagerConfig:
    """How the manager behaves.

    Attributes
    ----------
    policy : str
        Eviction policy, a key of :data:`expertier.residency.POLICIES`.
    half_life : float or None
        Half-life in tokens of a frequency policy; ``None`` is the policy's default.
    io_threads : int
        Reads in flight at a time.
    chunk_bytes : int
        Size at which a running read can be overtaken.
    quotas : mapping of int to int, or None
        Most bytes each layer may hold; layers not named share the rest of the budget freely.
    fill : bool
        Whether free room is filled with the likeliest absent experts, in the background and without evicting
        anything: from the start when all experts fit, otherwise while tokens are decoded, because a prompt that
        streams through the layers would drive them out again.
    every_layer : bool
        Whether every layer always keeps at least one token's experts, and as many more as leave room for a whole
        layer: who computes with resident experts only needs some everywhere.
    """

    policy: str = "lfu"
    half_life: float | None = None
    io_threads: int = 2
    chunk_bytes: int = 2 << 20
    quotas: Mapping[int, int] | None = None
    fill: bool = False
    every_layer: bool = False


class Lease:
    """A layer's working set, pinned until released. Use it as a context manager or call :meth:`release`.

    Attributes
    ----------
    layer : int
        The layer.
    """

    __slots__ = ("_experts", "_manager", "_phase", "_released", "_stages_ready", "_waiting", "layer")

    def __init__(self, manager: OffloadManager, layer: int, experts: IntArray, waiting: IntArray | None) -> None:
        self.layer = layer
        self._manager = manager
        self._experts = experts
        self._waiting = waiting  # experts that were not resident at the start; None once all are
        self._stages_ready = 0
        self._phase = manager._phase
        self._released = False

    def __len__(self) -> int:
        return len(self._experts)

    def ready(self, stage: int) -> bool:
        """Whether everything up to `stage` has arrived, without waiting."""
        return self._waiting is None or stage < self._stages_ready or self._manager._stage_ready(self, stage)

    def wait(self, stage: int | None = None) -> None:
        """Block until every expert of the set has arrived, up to and including `stage` (``None``: completely).

        Raises
        ------
        ExpertLoadError
            When one of the experts could not be read.
        """
        if self._waiting is not None and (stage is None or stage >= self._stages_ready):
            self._manager._wait(self, stage)

    def release(self) -> None:
        """Unpin the working set. Releasing twice does nothing."""
        if not self._released:
            self._released = True
            self._manager._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


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
        self._layers = sorted(experts)
        self._position = {layer: position for position, layer in enumerate(self._layers)}
        self._experts = dict(experts)
        self._top_k = dict(top_k)
        counts = np.array([experts[layer] for layer in self._layers])
        self._base = dict(zip(self._layers, np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist(), strict=True))
        total = int(counts.sum())
        self._even = len(set(counts.tolist())) == 1
        self._layer_index = np.repeat(np.arange(len(self._layers)), counts)
        self._slot_bytes = {layer: pool.slot_bytes(layer) for layer in self._layers}
        self._least_slot = min(self._slot_bytes.values())
        self._slot_of = np.array([self._slot_bytes[layer] for layer in self._layers])[self._layer_index]
        self._smallest = {layer: min(experts[layer], top_k[layer]) * self._slot_bytes[layer] for layer in self._layers}

        self._policy = make_policy(
            self.config.policy,
            ExpertSpace(layer_of=self._layer_index, layers=len(self._layers)),
            half_life=self.config.half_life,
        )
        self._listener = self._policy if isinstance(self._policy, ForecastListener) else None
        if isinstance(pool, TieredPool):
            pool.rank_by(lambda these, layer: self._policy.keep_scores(these, self._position[layer]))
        self._column = np.arange(total) - np.repeat([self._base[layer] for layer in self._layers], counts)
        self._uses = UseCounts(total)
        self._warm = False  # the policy knows from an earlier run what is used often
        self._quotas = dict(self.config.quotas or {})
        self._layer_bytes = dict.fromkeys(self._layers, 0)

        self._state = np.zeros(total, np.int8)
        self._pins = np.zeros(total, np.int32)
        stages = max(pool.stages(layer) for layer in self._layers)
        self._pending = np.zeros((total, stages), np.int16)
        self._ahead = np.zeros(total, bool)  # loaded by a prefetch and not used yet
        self._filling = np.zeros(total, bool)  # loading in the background, for nobody in particular
        self._requests: dict[int, list[ReadRequest]] = {}
        self._queued_at: dict[int, float] = {}
        self._errors: dict[int, BaseException] = {}
        self._finished_in_step = np.zeros(len(self._layers), bool)

        self._stats = Stats(total_bytes=int(self._slot_of.sum()), total_experts=total)
        self._phase: PhaseCounters = self._stats.decode
        self._sweeping = False  # this step needs most experts of every layer
        self._used = 0
        self._step_needs = 0  # bytes that a layer of the running step may need
        self._lock = threading.Condition()
        self._admission = threading.Lock()  # one caller at a time waits for room, the others hold complete leases
        self._leases = 0
        self._tight = False  # somebody waits for memory to become free: prefetches stay away
        self._closed = False
        self._check_budget(budget)
        self._check_quotas()
        self._budget = budget
        self._io = IoScheduler(self._on_done, threads=self.config.io_threads, chunk_bytes=self.config.chunk_bytes)

    # ---- steps

    def warm_up(self) -> None:
        """Begin to fill the pool where the configuration asks for it; returns at once.

        What to fill it with must be known: everything fits, or :meth:`warm` told what is used often. Where every layer
        keeps some experts, it waits for the first of them, which count as a prompt's.
        """
        if self.config.every_layer:
            self._phase = self._stats.prefill
            for layer in self._layers:
                chances = self._policy.use_probability(self._base[layer] + np.arange(self._experts[layer]))
                self.acquire(layer, np.argsort(-chances, kind="stable")[: self._top_k[layer]]).release()
        with self._lock:
            if self._warm or self._budget >= self._stats.total_bytes:
                self._fill()

    def wait_until_filled(self) -> None:
        """Block until nothing loads in the background: what :meth:`warm_up` began has arrived, or could not be read."""
        with self._lock:
            while self._filling.any() and not self._closed:
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
        flat = np.concatenate([np.asarray(chances[layer], np.float64) for layer in self._layers])
        with self._lock:
            self._uses.add(flat, tokens)
            self._policy.warm(flat)
            self._warm = True

    def uses(self) -> tuple[dict[int, NDArray[np.float64]], float]:
        """What :meth:`warm` takes: the share of tokens that used each expert, and of how many tokens."""
        with self._lock:
            flat, tokens = self._uses.chances(), self._uses.tokens
        return {layer: flat[base : base + self._experts[layer]] for layer, base in self._base.items()}, tokens

    def begin_step(self, tokens: int = 1, phase: Phase = "decode") -> None:
        """Start a forward pass over `tokens` tokens: of one sequence (prefill) or of one sequence each (decode)."""
        with self._lock:
            self._check_open()
            self._policy.advance(1 if phase == "decode" else tokens)  # the tokens of a decode batch are simultaneous
            self._sweeping = False
            self._phase = self._stats.decode if phase == "decode" else self._stats.prefill
            self._phase.steps += 1
            self._phase.tokens += tokens
            self._finished_in_step[:] = False
            self._step_needs = self._most_needed(tokens)
            self._fill()

    def _most_needed(self, tokens: int) -> int:
        """Bytes that a layer of a step of so many tokens may need, at most the budget: more would fail anyway."""
        most = max(
            min(self._experts[layer], tokens * self._top_k[layer]) * self._slot_bytes[layer] for layer in self._layers
        )
        return min(most, self._budget)

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
            now, soon = forecast.now, forecast.soon
            if self._even:
                now, soon = now.reshape(-1), soon.reshape(len(soon), -1)
            else:
                now, soon = now[self._layer_index, self._column], soon[:, self._layer_index, self._column]
            return self._listener.expect(now.astype(np.float64), soon.astype(np.float64))

    def end_step(self) -> None:
        """End the forward pass: prefetches for layers that did not come are given up."""
        with self._lock:
            self._step_needs = 0
            self._cancel(self._unclaimed())

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
        flat = table.ravel() + self._base[layer]
        ages = None
        if table.ndim == 2 and len(table) > 1:
            last = 0 if self._phase is self._stats.decode else len(table) - 1
            ages = np.repeat(np.linspace(last, 0, len(table)), table.shape[1])
        with self._lock:
            self._policy.touch(flat, ages)
            self._uses.note(flat, rows := len(table) if table.ndim == 2 else 1)
            if layer == self._layers[0]:
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
        wanted = (chosen[0] if chosen.ndim == 2 and len(chosen) == 1 else np.unique(chosen)) + self._base[layer]
        with self._lock:
            self._check_open()
            try:
                resident = (self._state[wanted] == _RESIDENT).all()
            except IndexError:
                resident = False  # refused below, with words
            if resident:
                if self._requests:
                    self._cancel_other_prefetches(layer)
                self._pins[wanted] += 1
                self._leases += 1
                self._phase.ready_hits += len(wanted)
                self._note_used(wanted)
                self._finished_in_step[self._position[layer]] = True
                return Lease(self, layer, wanted, None)
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
            everything = np.arange(len(self._state))
            self._pins[everything] += 1
            self._leases += 1
            self._phase.ready_hits += sum(
                min(self._experts[layer], tokens * self._top_k[layer]) for layer in self._layers
            )
            self._note_used(everything)
            return Lease(self, self._layers[0], everything, None)

    def _acquire_absent(self, layer: int, wanted: IntArray) -> Lease:
        local = wanted - self._base[layer]
        if local.size and not 0 <= local[0] <= local[-1] < self._experts[layer]:
            raise ExpertLoadError(f"Layer {layer} has {self._experts[layer]} experts, asked for were {local.tolist()}.")
        needed_bytes = len(wanted) * self._slot_bytes[layer]
        with self._lock:
            self._check_open()
            if needed_bytes > self._limit(layer):
                raise BudgetError(
                    f"Layer {layer} of this step needs {len(wanted)} experts ({format_bytes(needed_bytes)}), "
                    f"the budget is {format_bytes(self._limit(layer))}.",
                    "Raise the budget or process fewer tokens per step (llama.cpp: a smaller n_ubatch).",
                )
            self._sweeping |= len(wanted) > self._top_k[layer] and len(wanted) >= _SWEEP_FROM * self._experts[layer]
            self._pins[wanted] += 1
            self._leases += 1
            try:
                state = self._state[wanted]
                waiting = wanted[state != _RESIDENT]
                late = wanted[state == _LOADING]
                self._phase.ready_hits += len(wanted) - len(waiting)
                self._phase.late += len(late)
                self._phase.misses += len(waiting) - len(late)
                self._note_used(wanted)
                self._cancel_other_prefetches(layer)
                for expert in late.tolist():
                    for request in self._requests[expert]:
                        self._io.promote(request)
                self._finished_in_step[self._position[layer]] = True
                begun = np.zeros(len(waiting), bool)
                while True:
                    # What failed before this call is tried again; what fails during it is not, or a broken disk
                    # would be read over and over until there is room.
                    self._raise_own_error(layer, waiting[begun])
                    state = self._state[waiting]
                    absent = waiting[state <= _SPARE]
                    complete = not absent.size or self._load_what_fits(layer, absent, DEMAND)
                    begun |= self._state[waiting] == _LOADING
                    if not complete:
                        self._wait_for_room(layer)
                    elif (state == _CANCELLING).any():
                        self._pause()
                    else:
                        break
            except BaseException:
                self._pins[wanted] -= 1
                self._leases -= 1
                self._lock.notify_all()
                raise
            return Lease(self, layer, wanted, waiting)

    def _note_used(self, wanted: IntArray) -> None:
        ahead = self._ahead[wanted]
        if ahead.any():
            self._stats.prefetches_used += int(ahead.sum())
            self._ahead[wanted] = False

    def _stage_ready(self, lease: Lease, stage: int) -> bool:
        assert lease._waiting is not None
        if not self._pending[lease._waiting, : stage + 1].any():
            return True
        # An error also counts as ready: the caller then waits, and the wait raises.
        return bool(self._errors) and any(expert in self._errors for expert in lease._waiting.tolist())

    def _wait(self, lease: Lease, stage: int | None) -> None:
        waiting = lease._waiting
        assert waiting is not None
        stop = self._pending.shape[1] if stage is None else stage + 1
        started = time.perf_counter()
        with self._lock:
            while True:
                self._check_open()
                self._raise_own_error(lease.layer, waiting)
                if not self._pending[waiting, :stop].any():
                    break
                self._lock.wait()
            lease._phase.stall_seconds += time.perf_counter() - started
        lease._stages_ready = stop
        if stop == self._pending.shape[1]:
            lease._waiting = None

    def _raise_own_error(self, layer: int, experts: IntArray) -> None:
        if not self._errors:
            return
        for expert in experts.tolist():
            if (cause := self._errors.get(expert)) is not None:
                local = expert - self._base[layer]
                raise ExpertLoadError(f"Expert {local} of layer {layer} could not be loaded: {cause}") from cause

    def _pause(self) -> None:
        """Wait until a load ends or a lease is released, on the caller's time."""
        started = time.perf_counter()
        self._lock.wait()
        self._phase.stall_seconds += time.perf_counter() - started
        self._check_open()

    def _release(self, lease: Lease) -> None:
        with self._lock:
            self._pins[lease._experts] -= 1
            self._leases -= 1
            self._lock.notify_all()

    # ---- loading and eviction; everything below is called with the lock held

    def _limit(self, layer: int) -> int:
        return min(self._budget, self._quotas.get(layer, self._budget))

    def _evictable(self, layer: int | None, least: int | None = None, *, worth: FloatArray | None = None) -> IntArray:
        """Resident, unpinned experts that may make room for `layer` (``None``: for nobody), best victims first.

        With `least` only the first so many, and those that are as good as the last of them: sorting thousands to take
        two cost more than all else a miss costs here. With `worth` (of all experts) that counts and not the policy.
        """
        position = 0
        usable = (self._state == _RESIDENT) & (self._pins == 0)
        if layer is not None:
            position = self._position[layer]
            if self._layer_bytes[layer] + self._slot_bytes[layer] > self._limit(layer):
                usable &= self._layer_index == position
        candidates = np.flatnonzero(usable)
        scores = self._policy.keep_scores(candidates, position) if worth is None else worth[candidates]
        if self.config.every_layer:
            spared = spare_every_layer(self._layer_index, self._state == _RESIDENT, self._floor(), candidates, scores)
            candidates, scores = candidates[spared], scores[spared]
        if self._sweeping:
            # A step of many tokens touches most experts of every layer: those of layers still to come would be read
            # again within this very step, so layers already finished give first.
            order: IntArray = np.lexsort((scores, ~self._finished_in_step[self._layer_index[candidates]]))
            return candidates[order]
        if least is not None and least < len(candidates):
            first = np.flatnonzero(scores <= np.partition(scores, least)[least])
            candidates, scores = candidates[first], scores[first]
        return candidates[np.argsort(scores, kind="stable")]

    def _victims(self, layer: int, priority: int, least: int | None = None) -> list[tuple[int, float]]:
        """Experts that may make room for `layer` with what each is worth to a prefetch, best victim last."""
        victims = self._evictable(layer, least)[::-1]
        if priority == DEMAND:
            worth = np.zeros(len(victims))
        else:
            worth = self._policy.use_probability(victims)
            if self._sweeping:  # layers still to come need all of theirs within this step
                worth[~self._finished_in_step[self._layer_index[victims]]] = np.inf
        return list(zip(victims.tolist(), worth.tolist(), strict=True))

    def _load_what_fits(
        self, layer: int, missing: IntArray, priority: int, chances: NDArray[np.float64] | None = None
    ) -> bool:
        """Begin loads for as many of `missing` as there is room for; whether all could begin.

        With `chances`, an expert makes room only for one that is likelier to be used.
        """
        slot = self._slot_bytes[layer]
        reads: list[list[ReadRequest]] = []
        victims: list[tuple[int, float]] | None = None
        full = partial = False
        complete = True
        try:
            for index, expert in enumerate(missing.tolist()):
                recycled: int | None = None
                if self._state[expert] == _SPARE:
                    recycled = expert
                elif self._used + slot > self._budget or self._layer_bytes[layer] + slot > self._limit(layer):
                    recycled = self._spare_slot(layer, slot)
                    if recycled is None:
                        was_full, full = full, self._layer_bytes[layer] + slot > self._limit(layer)
                        if victims is None or full != was_full:  # a layer at its quota lives on its own
                            victims = self._victims(layer, priority, len(missing))
                            partial = True
                        chance = np.inf if chances is None else float(chances[index])
                        recycled, fits = self._make_room(layer, slot, victims, chance)
                        if not fits and partial and not (victims and victims[-1][1] >= chance):
                            victims = self._victims(layer, priority)
                            partial = False
                            recycled, fits = self._make_room(layer, slot, victims, chance)
                        if not fits:
                            complete = False
                            break
                reads.append(self._begin(layer, expert, recycled, priority))
        finally:
            # All experts' first stage before any second one: the first multiplication starts as soon as it can.
            # Also after an error: what has begun must be read, or whoever waits for it would wait for ever.
            self._io.submit([request for group in _transpose(reads) for request in group])
        return complete

    def _spare_slot(self, layer: int, slot: int) -> int | None:
        for spare in np.flatnonzero(self._state == _SPARE).tolist():
            same_layer = self._layer_index[spare] == self._position[layer]
            if self._layer_bytes[layer] + slot > self._limit(layer) and not same_layer:
                continue
            if self._pins[spare]:
                continue  # somebody is about to load into it
            if self._slot_of[spare] == slot:
                return int(spare)
            self._drop(spare)
        return None

    def _make_room(
        self, layer: int, slot: int, victims: list[tuple[int, float]], chance: float
    ) -> tuple[int | None, bool]:
        """Evict until `slot` bytes fit. A victim of the same size is handed over instead of dropped.

        Nothing is evicted when all that may go is not enough, or when something worth more than `chance` had to go.
        """
        leaving: list[tuple[int, float]] = []
        freed = 0
        while self._used + slot - freed > self._budget or self._layer_bytes[layer] + slot > self._limit(layer):
            if not victims or victims[-1][1] >= chance:
                victims.extend(reversed(leaving))
                return None, False
            victim, worth = victims.pop()
            if self._slot_of[victim] == slot:
                victims.extend(reversed(leaving))
                self._stats.evictions += 1
                return victim, True
            leaving.append((victim, worth))
            freed += int(self._slot_of[victim])
        self._stats.evictions += len(leaving)
        for victim, _ in leaving:
            self._drop(victim)
        return None, True

    def _drop(self, expert: int) -> None:
        layer = self._layers[self._layer_index[expert]]
        self._pool.drop(layer, expert - self._base[layer])
        self._forget(expert)

    def _forget(self, expert: int) -> None:
        slot = int(self._slot_of[expert])
        self._state[expert] = _ABSENT
        self._ahead[expert] = False
        self._used -= slot
        self._layer_bytes[self._layers[self._layer_index[expert]]] -= slot

    def _begin(self, layer: int, expert: int, recycled: int | None, priority: int) -> list[ReadRequest]:
        slot = self._slot_bytes[layer]
        source: tuple[int, int] | None = None
        if recycled is not None:
            old_layer = self._layers[self._layer_index[recycled]]
            source = (old_layer, recycled - self._base[old_layer])
            self._forget(recycled)
        self._used += slot
        self._layer_bytes[layer] += slot
        self._stats.peak_resident_bytes = max(self._stats.peak_resident_bytes, self._used)
        try:
            plan = self._pool.place(layer, expert - self._base[layer], source)
        except BaseException:
            self._used -= slot
            self._layer_bytes[layer] -= slot
            # Neither is counted any more, so neither may keep memory.
            self._pool.drop(layer, expert - self._base[layer])
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
            self._state[expert] = _RESIDENT
            return requests
        self._state[expert] = _LOADING
        self._requests[expert] = list(requests)
        self._queued_at[expert] = time.perf_counter()
        return requests

    def _wait_for_room(self, layer: int) -> None:
        """Wait until a load ends or a lease is released; give up prefetches meanwhile."""
        spare = int((self._state == _SPARE).sum())
        self._cancel(np.flatnonzero((self._state == _LOADING) & (self._pins == 0)))
        if int((self._state == _SPARE).sum()) > spare:
            return  # reads that were only queued have ended already: nobody would wake us for them
        if not (self._state == _CANCELLING).any() and self._leases <= 1:
            raise BudgetError(
                f"There is no room for another expert of layer {layer} within {format_bytes(self._budget)}.",
                "Raise the budget, or process fewer tokens per step.",
            )
        self._tight = True
        try:
            self._pause()
        finally:
            self._tight = False

    def _cancel_other_prefetches(self, layer: int) -> None:
        """The router has spoken: prefetches for this layer that it does not want are given up."""
        mine = self._position[layer]
        self._cancel([expert for expert in self._unclaimed() if self._layer_index[expert] == mine])

    def _unclaimed(self) -> list[int]:
        """Experts loading ahead of a need that no lease has claimed: among the few that load at all."""
        state, pins, filling = self._state, self._pins, self._filling
        return [one for one in self._requests if state[one] == _LOADING and not pins[one] and not filling[one]]

    def _cancel(self, experts: Iterable[int]) -> None:
        for expert in experts:
            expert = int(expert)
            requests = self._requests.get(expert)
            if requests is None or self._state[expert] != _LOADING:
                continue
            self._state[expert] = _CANCELLING
            self._stats.prefetches_cancelled += int(self._ahead[expert])
            self._ahead[expert] = False
            for request in list(requests):
                self._io.cancel(request)

    def _on_done(self, request: ReadRequest, error: BaseException | None, cancelled: bool) -> None:
        expert, stage = request.tag
        with self._lock:  # re-entrant: a cancel can complete a request at once
            requests = self._requests[expert]
            requests.remove(request)
            self._pending[expert, stage] -= 1
            if error is not None:
                self._errors.setdefault(expert, error)
                self._ahead[expert] = False
            if error is not None or cancelled:
                self._state[expert] = _CANCELLING
            if not requests:
                del self._requests[expert]
                self._stats.load_seconds += time.perf_counter() - self._queued_at.pop(expert)
                self._state[expert] = _RESIDENT if self._state[expert] == _LOADING else _SPARE
                if self._filling[expert]:
                    self._filling[expert] = False
                    if error is None:
                        self._fill()
            elif error is not None:
                # The rest is of no use, and a retry should not have to wait for it.
                for other in list(requests):
                    self._io.cancel(other)
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
        local = np.asarray(experts, np.int64)
        chance = np.ones(len(local)) if probabilities is None else np.asarray(probabilities, np.float64)
        if len(local) > 1:
            first = np.sort(np.unique(local, return_index=True)[1])
            local, chance = local[first], chance[first]
        wanted = local + self._base[layer]
        with self._lock:
            self._check_open()
            if self._tight:
                return 0
            limit -= len(self._unclaimed())
            absent = np.flatnonzero(self._state[wanted] <= _SPARE)[: max(limit, 0)]
            if not absent.size:
                return 0
            chosen = wanted[absent]
            self._pins[wanted] += 1  # none of the named makes room for another
            try:
                self._load_what_fits(layer, chosen, PREFETCH, chance[absent])
            except ExpertLoadError as error:  # whoever really needs the expert will raise it
                logger.warning("Loading ahead for layer %d ended early: %s", layer, error)
            finally:
                self._pins[wanted] -= 1
            begun = chosen[(self._state[chosen] == _LOADING) | (self._state[chosen] == _RESIDENT)]
            self._ahead[begun] = True
            self._stats.prefetches += len(begun)
            self._stats.prefetches_declined += len(chosen) - len(begun)
            return len(begun)

    def _fill(self) -> None:
        """Begin loads of the likeliest absent experts into free room, a few at a time."""
        everything_fits = self._budget >= self._stats.total_bytes
        if not self.config.fill or (self._phase is not self._stats.decode and not everything_fits):
            return
        if self._used + self._least_slot > self._budget or self._tight or self._closed or self._filling.any():
            return
        absent = np.flatnonzero(self._state == _ABSENT)
        if not absent.size:
            return
        best = absent[np.argsort(-self._policy.use_probability(absent), kind="stable")]
        reads: list[list[ReadRequest]] = []
        try:
            for expert in best[: 2 * self.config.io_threads].tolist():
                layer = self._layers[self._layer_index[expert]]
                slot = self._slot_bytes[layer]
                if self._used + slot <= self._budget and self._layer_bytes[layer] + slot <= self._limit(layer):
                    reads.append(self._begin(layer, expert, None, PREFETCH))
                    self._filling[expert] = self._state[expert] == _LOADING
        except ExpertLoadError as error:  # whoever really needs the expert will raise it
            logger.warning("Filling free room ended early: %s", error)
        finally:
            self._io.submit([request for group in _transpose(reads) for request in group])

    @property
    def swapping(self) -> bool:
        """Whether a load in the background is under way."""
        with self._lock:
            return bool(self._filling.any())

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
            absent = np.flatnonzero(self._state == _ABSENT)
            if self._tight or self._filling.any() or not absent.size:
                return 0
            if worth is None:
                worth = self._policy.use_probability(np.arange(len(self._state)))
            reads: list[list[ReadRequest]] = []
            try:
                for expert in absent[np.argsort(-worth[absent], kind="stable")[:most]].tolist():
                    layer = self._layers[self._layer_index[expert]]
                    slot = self._slot_bytes[layer]
                    recycled: int | None = None
                    if self._used + slot > self._budget or self._layer_bytes[layer] + slot > self._limit(layer):
                        candidates = self._evictable(layer, worth=worth)[::-1]
                        victims = list(zip(candidates.tolist(), worth[candidates].tolist(), strict=True))
                        recycled, fits = self._make_room(layer, slot, victims, float(worth[expert]) / margin)
                        if not fits:
                            break
                    reads.append(self._begin(layer, expert, recycled, PREFETCH))
                    self._filling[expert] = self._state[expert] == _LOADING
            except ExpertLoadError as error:  # whoever really needs the expert will raise it
                logger.warning("Swapping in an expert ended early: %s", error)
            finally:
                self._io.submit([request for group in _transpose(reads) for request in group])
            self._stats.swaps += len(reads)
            return len(reads)

    # ---- budget, life cycle, numbers

    @property
    def budget(self) -> int:
        """The budget in bytes."""
        return self._budget

    def _floor(self) -> int:
        """Experts that each layer keeps."""
        room = self._budget - max(self._experts[layer] * self._slot_bytes[layer] for layer in self._layers)
        return max(max(self._top_k.values()), room // sum(self._slot_bytes.values()))

    def _check_budget(self, budget: int) -> None:
        if self.config.every_layer and budget < sum(self._smallest.values()):
            raise BudgetError(
                f"A budget of {format_bytes(budget)} cannot hold the experts one token needs in every layer at once "
                f"({format_bytes(sum(self._smallest.values()))}), so steps would have to wait.",
                f"Give at least {sum(self._smallest.values())} bytes, or a finite virtual_bias.",
            )
        layer = max(self._layers, key=lambda index: self._smallest[index])
        if budget < self._smallest[layer]:
            raise BudgetError(
                f"A budget of {format_bytes(budget)} cannot hold the experts one token needs in layer {layer} "
                f"({format_bytes(self._smallest[layer])}).",
                f"Give at least {self._smallest[layer]} bytes.",
            )

    def _check_quotas(self) -> None:
        for layer, quota in self._quotas.items():
            if layer not in self._smallest:
                raise BudgetError(f"There is a quota for layer {layer}, which has no experts.", "Remove the quota.")
            if quota < self._smallest[layer]:
                raise BudgetError(
                    f"A quota of {format_bytes(quota)} cannot hold the experts one token needs in layer {layer} "
                    f"({format_bytes(self._smallest[layer])}).",
                    f"Give at least {self._smallest[layer]} bytes.",
                )

    def bytes_of(self, layer: int, experts: int) -> int:
        """Memory that so many experts of a layer occupy."""
        return experts * self._slot_bytes[layer]

    def resize(self, budget: int) -> None:
        """Change the budget while the engine runs, also in the middle of a step, from any thread.

        Returns when the pool holds no more than that.

        Raises
        ------
        BudgetError
            When the new budget cannot hold one token's experts, or what a layer of the running step may need: that step
            would fail. The old one stays in force, and nothing was evicted.
        """
        self._check_budget(budget)
        with self._admission, self._lock:
            self._check_open()
            if budget < self._step_needs:
                raise BudgetError(
                    f"A budget of {format_bytes(budget)} cannot hold what a layer of the running step may need "
                    f"({format_bytes(self._step_needs)}).",
                    "Try again when the step has ended.",
                )
            self._budget = budget
            try:
                while self._used > self._budget:
                    self._tight = True
                    self._shrink()
            finally:
                self._tight = False

    def _shrink(self) -> None:
        """Give back what is free to go; wait when there is nothing."""
        spare = np.flatnonzero((self._state == _SPARE) & (self._pins == 0)).tolist()
        victims = spare or self._evictable(None).tolist()
        for expert in victims:
            if self._used <= self._budget:
                return
            self._stats.evictions += int(self._state[expert] == _RESIDENT)
            self._drop(expert)
        if victims:
            return
        self._cancel(np.flatnonzero((self._state == _LOADING) & (self._pins == 0)))
        # Reads that were only queued have ended already: nobody would wake us for them.
        if not ((self._state == _SPARE) & (self._pins == 0)).any():
            self._lock.wait()
            self._check_open()

    def stats(self) -> Stats:
        """Return a snapshot of all counters."""
        with self._lock:
            self._stats.budget_bytes = self._budget
            self._stats.resident_bytes = self._used
            self._stats.resident_experts = int((self._state == _RESIDENT).sum())
            self._stats.bytes_read = self._io.bytes_read
            self._stats.prefetch_bytes_read = self._io.prefetch_bytes_read
            return copy.deepcopy(self._stats)

    @property
    def idle(self) -> bool:
        """Whether nothing is being loaded."""
        return not self._requests

    @property
    def bytes_read(self) -> int:
        """Bytes of all loads so far."""
        return self._io.bytes_read

    @property
    def misses(self) -> int:
        """Experts that were absent when they were needed, in all steps so far."""
        return self._stats.decode.misses + self._stats.prefill.misses

    @property
    def complete(self) -> bool:
        """Whether every expert is resident."""
        return self._used >= self._stats.total_bytes and bool((self._state == _RESIDENT).all())

    def resident(self, layer: int, *, arriving: bool = False) -> NDArray[np.bool_]:
        """Which experts of a layer are resident, or with `arriving` at least on their way, shape ``(experts,)``."""
        base = self._base[layer]
        with self._lock:
            state = self._state[base : base + self._experts[layer]]
            resident: NDArray[np.bool_] = state == _RESIDENT
            if arriving:
                resident |= state == _LOADING
        return resident

    @property
    def under_way(self) -> int:
        """Loads ahead of need that have begun and that no lease has claimed."""
        with self._lock:
            return len(self._unclaimed())

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
            absent = self._state <= _SPARE
            under_way = len(self._unclaimed())
        if self._even:
            return absent.reshape(len(self._layers), -1), under_way
        table = np.zeros((len(self._layers), max(self._experts.values())), bool)
        table[self._layer_index, self._column] = absent
        return table, under_way

    def close(self) -> None:
        """Stop I/O and release all memory. Waiters are woken with an error. Closing twice does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
        self._io.close()
        self._pool.close()

    def disown(self) -> None:
        """Close without touching anything, in a forked child: the I/O threads and whoever held a lock are not there."""
        self._lock = threading.Condition()
        self._admission = threading.Lock()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ManagerClosedError("The offload manager is closed.", "Load the model again.")


def _transpose(reads: list[list[ReadRequest]]) -> list[list[ReadRequest]]:
    """Group requests by stage instead of by expert."""
    stages: dict[int, list[ReadRequest]] = {}
    for expert_reads in reads:
        for request in expert_reads:
            stages.setdefault(request.tag[1], []).append(request)
    return [stages[stage] for stage in sorted(stages)]
