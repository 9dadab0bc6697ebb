"""The loop of the batch engine: who takes part in the next step with how many tokens, and what follows from it."""

from __future__ import annotations

import collections
import contextlib
import threading
from dataclasses import replace
from typing import Any

import llama_cpp

from expertier.errors import BudgetError, ContextFullError, ExpertierError
from expertier.scheduling import Admission, resident_experts
from expertier_llamacpp.batch.room import KvRoom, common_length
from expertier_llamacpp.batch.route_log import RouteLog
from expertier_llamacpp.batch.sequence import ActiveSequence
from expertier_llamacpp.batch.step import StepBatch
from expertier_llamacpp.batch.telemetry import EngineStats
from expertier_llamacpp.llama import Llama
from expertier_llamacpp.signals import HeldSignals

_WORTH_WAITING = 32  # tokens of a common beginning for which a prompt waits until another has computed them
_PATIENT_STEPS = 64  # steps without trouble after which a shortened step may grow again
_SPARE_CELLS = 16  # KV cells that each running sequence should find free when another joins
_NO_ROOM = "llama_decode returned 1"  # upstream: llama_decode, "could not find a KV slot for the batch"

Part = tuple[ActiveSequence, int]
"""A sequence and how many of its missing tokens a step computes."""


class StepLoop:
    """Sequences join, are computed together and leave.

    Parameters
    ----------
    llama : Llama
        A model whose context holds several sequences.
    admission : Admission
        Says who of those that wait joins.

    Attributes
    ----------
    n_ctx, max_sequences : int
        Tokens and sequences the context holds.

    Notes
    -----
    :meth:`add` and :meth:`everybody` may be called from any thread, :meth:`step` and :meth:`clear` from one at a time.
    """

    def __init__(self, llama: Llama, admission: Admission) -> None:
        self._manager = llama.offload
        self._layers = [layer.layer for layer in llama.catalog.layers]
        self._width = max(layer.experts for layer in llama.catalog.layers)
        self._routes: RouteLog | None = None
        if admission.book is not None:
            self._routes = RouteLog(self._layers, max(layer.top_k for layer in llama.catalog.layers))
            llama._hook.listener = self._routes.note
        self._context: Any = llama._ctx
        self._virtual = llama.virtual
        params: Any = llama.context_params
        self.max_sequences = int(params.n_seq_max)
        self.n_ctx = int(llama.n_ctx())
        self._longest_step = int(params.n_batch)
        self._longest_mixed = int(params.n_ubatch)
        self._most = self._longest_step  # tokens in a step; fewer while the budget asks for it
        self._calm = 0
        self._misses = 0
        model = llama._model.model
        recurrent = llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model)
        windowed = llama_cpp.llama_model_n_swa(model) > 0 and not params.swa_full
        self._room = KvRoom(
            self._context.memory,
            cells=self.n_ctx,
            slots=self.max_sequences,
            sharing=not recurrent and not windowed,
        )
        self._batch = StepBatch(self._longest_step)
        self._admission = admission
        self._inbox: collections.deque[ActiveSequence] = collections.deque()
        self._waiting: dict[int, ActiveSequence] = {}
        self._running: list[ActiveSequence] = []
        self._stats = EngineStats()
        self._changing = threading.Lock()  # who waits and who runs

    def add(self, sequence: ActiveSequence) -> None:
        """Let a sequence wait for its turn."""
        self._inbox.append(sequence)

    def everybody(self) -> list[ActiveSequence]:
        """All sequences that wait or run."""
        with self._changing:
            return [*self._inbox, *self._waiting.values(), *self._running]

    def clear(self) -> None:
        """Forget all sequences."""
        with self._changing:
            self._inbox.clear()
            self._waiting.clear()
            self._running.clear()

    def forget(self) -> None:
        """Forget what finished requests left in the KV memory."""
        while self._room.reclaim():
            pass

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        return replace(
            self._stats,
            running=len(self._running),
            waiting=len(self._inbox) + len(self._waiting),
            kv_tokens=self._room.cells - self._room.free,
            kv_capacity=self._room.cells,
        )

    def step(self) -> bool:
        """Let requests join and leave, and compute one step; whether there was anything to compute."""
        with self._changing:
            self._leave()
            self._join()
            parts = self._make_room(self._plan())
        if not parts:
            return False
        self._compute(parts)
        with self._changing:
            self._leave()
        return True

    def _leave(self) -> None:
        """Let go of requests that are over."""
        for sequence in [item for item in self._running if item.over]:
            self._running.remove(sequence)
            self._release(sequence)
            self._admission.leave(sequence.number)
        for sequence in [item for item in self._waiting.values() if item.over]:
            del self._waiting[sequence.number]
            self._admission.leave(sequence.number)

    def _release(self, sequence: ActiveSequence) -> None:
        if sequence.slot is not None:
            self._room.leave(sequence.slot)
            sequence.slot = None

    def _join(self) -> None:
        """Let waiting requests join while there are slots and KV memory."""
        while self._inbox:
            sequence = self._inbox.popleft()
            if not sequence.over:
                self._waiting[sequence.number] = sequence
                self._admission.arrive(sequence.number, sequence.tokens, priority=sequence.priority)
        if not self._waiting or len(self._running) >= self.max_sequences:
            return
        room = self.max_sequences - len(self._running)
        if any(not sequence.paused for sequence in self._running) and self._admission.holds(room):
            return  # whoever runs goes on, so that a place will be free
        resident = None
        if self._admission.compares:
            resident = resident_experts(self._manager, self._layers, self._width)
        for number in self._admission.propose(room, resident=resident):
            sequence = self._waiting[number]  # type: ignore[index]
            if self._running:
                promised = sum(item.missing for item in self._running) + _SPARE_CELLS * (len(self._running) + 1)
                new = len(sequence.tokens) - self._room.match(sequence.tokens)[1]
                if self._room.available() < new + promised:
                    break  # it waits until somebody leaves
            taken = self._room.take(sequence.tokens)
            assert taken is not None, "a slot for every sequence that may run"
            sequence.slot, sequence.computed = taken
            if sequence.exact and self._virtual is not None and self._virtual.stood_in:
                sequence.computed = self._cut(sequence, 0)  # what others left may have been computed with stand-ins
            self._stats.reused_tokens += sequence.computed
            sequence.behind = None if sequence.exact else self._find_leader(sequence)
            del self._waiting[sequence.number]
            self._running.append(sequence)
            self._admission.joined(sequence.number)

    def _find_leader(self, sequence: ActiveSequence) -> tuple[ActiveSequence, int] | None:
        """Somebody who is about to compute more of the same beginning."""
        if not self._room.sharing:
            return None
        best: tuple[ActiveSequence, int] | None = None
        length = sequence.computed + _WORTH_WAITING
        for other in self._running:
            if _waits_for(other, sequence):
                continue
            common = common_length(other.tokens, sequence.tokens, len(sequence.tokens) - 1)
            if other.computed < common and common >= length:
                best, length = (other, common), common + 1
        return best

    def _follow(self, sequence: ActiveSequence) -> bool:
        """Take over what the leader has computed; ``False`` while it has not."""
        if sequence.behind is None:
            return True
        leader, common = sequence.behind
        gone = leader.slot is None or leader.over
        if not gone and leader.computed < common:
            return False
        if not gone:
            assert leader.slot is not None
            assert sequence.slot is not None
            self._room.share(leader.slot, sequence.slot, common)
            self._stats.reused_tokens += common - sequence.computed
            sequence.computed = common
        sequence.behind = self._find_leader(sequence) if gone else None
        return sequence.behind is None

    def _plan(self) -> list[Part]:
        """Choose the tokens of the next step: the next one of everybody, then prompts in the order they joined."""
        ready = []
        for sequence in self._running:
            if sequence.missing == 0:
                # Its logits were lost with an interruption: the last token is computed again.
                sequence.computed = self._cut(sequence, sequence.computed - 1)
            if not sequence.paused and self._follow(sequence):
                ready.append(sequence)
        decoding = [sequence for sequence in ready if sequence.missing == 1]
        left = min(self._most, self._longest_mixed) if decoding else self._most
        if len(decoding) > left:  # everybody in turn
            decoding = decoding[:left]
            turned = set(map(id, decoding))
            self._running = [item for item in self._running if id(item) not in turned] + decoding
        left -= len(decoding)
        prompts = []
        for sequence in ready:
            if sequence.missing > 1 and left > 0:
                count = min(sequence.missing, left)
                prompts.append((sequence, count))
                left -= count
        # Prompts first: what comes last counts most for the eviction policy, and that is what goes on being used.
        return [*prompts, *((sequence, 1) for sequence in decoding)]

    def _make_room(self, parts: list[Part]) -> list[Part]:
        """Find KV memory for a step: at the cost of finished requests' leavings, then of who joined last."""
        while parts:
            needed = sum(count for _, count in parts)
            if needed <= self._room.free:
                return parts
            if self._room.reclaim():
                continue
            if not self._set_back():
                return [(sequence, min(count, self._room.free)) for sequence, count in parts[:1] if self._room.free]
            parts = [part for part in parts if part[0].slot is not None]
        return parts

    def _set_back(self) -> bool:
        """Let the request that joined last wait again; it will compute its tokens anew."""
        if len(self._running) < 2:
            return False
        sequence = self._running.pop()
        assert sequence.slot is not None
        self._room.cut(sequence.slot, 0)
        self._release(sequence)
        sequence.computed, sequence.behind = 0, None
        self._waiting[sequence.number] = sequence
        self._admission.arrive(sequence.number, sequence.tokens, priority=sequence.priority - 1)
        self._stats.set_back += 1
        return True

    def _compute(self, parts: list[Part]) -> None:
        rows = self._batch.fill(
            (
                _slot(sequence),
                sequence.computed,
                sequence.tokens[sequence.computed : sequence.computed + count],
                count == sequence.missing,
            )
            for sequence, count in parts
        )
        tokens = self._batch.n_tokens()
        if self._routes is not None:
            self._routes.begin(self._batch.wanted_rows(), tokens)
        exactly: Any = contextlib.nullcontext()
        if self._virtual is not None and any(sequence.exact for sequence, _ in parts):
            exactly = self._virtual.exactly()
        try:
            with exactly:
                self._context.decode(self._batch)
        except BaseException as error:
            for sequence, _ in parts:
                sequence.computed = self._cut(sequence, sequence.computed)
            if not isinstance(error, (ExpertierError, RuntimeError)):
                raise  # an interruption: nothing has happened
            if not self._recover(error, tokens):
                self._stats.failed_steps += 1
                for sequence, _ in parts:
                    sequence.fail(error)
            return
        with HeldSignals():  # a token that was chosen is also told
            for (sequence, count), row in zip(parts, rows, strict=True):
                start = sequence.computed
                self._room.grow(_slot(sequence), sequence.tokens[start : start + count])
                sequence.computed += count
                if not sequence.missing and not sequence.over:
                    self._choose(sequence, row)
        self._note(parts, tokens)
        if self._routes is not None:
            self._learn(parts, self._routes)

    def _choose(self, sequence: ActiveSequence, row: int) -> None:
        try:
            sequence.advance(self._context, row)
        except Exception as error:  # of this request's own sampler or receiver
            sequence.fail(error)

    def _cut(self, sequence: ActiveSequence, length: int) -> int:
        return self._room.cut(_slot(sequence), length)

    def _recover(self, error: Exception, tokens: int) -> bool:
        """Whether a smaller step may do what this one could not."""
        self._calm = 0
        if isinstance(error, BudgetError):
            if tokens == 1:
                return False
            self._most = max(1, min(tokens, self._most) // 2)
            self._stats.shortened_steps += 1
            return True
        if str(error) == _NO_ROOM:
            with self._changing:
                if self._room.reclaim() or self._set_back():
                    return True
            full = ContextFullError(
                "The KV memory has no room for the next token.", "Load the model with a larger n_ctx."
            )
            for sequence in self._running:
                sequence.fail(full)
            return True
        return False

    def _note(self, parts: list[Part], tokens: int) -> None:
        """Count a step that went well."""
        self._calm += 1
        if self._most < self._longest_step and self._calm >= _PATIENT_STEPS:
            self._calm = 0
            self._most = min(2 * self._most, self._longest_step)
        self._stats.steps += 1
        self._stats.tokens += tokens
        self._stats.sequence_steps += len(parts)
        if self._routes is None:
            self._admission.step()

    def _learn(self, parts: list[Part], log: RouteLog) -> None:
        """Let the scheduler know what the step's tokens used."""
        if log.seen:
            names = [sequence.number for sequence, count in parts for _ in range(count)]
            self._admission.observe(names, self._batch.tokens(), log.routes)
        misses = self._manager.misses
        decoding = len(parts) == self._batch.n_tokens()  # steps with prompts in them say nothing about regrouping
        self._admission.step(len(parts) if decoding else 0, misses - self._misses)
        self._misses = misses


def _waits_for(other: ActiveSequence, sequence: ActiveSequence) -> bool:
    """Whether one waits for what the other computes, at whatever remove: then the other must not wait for it."""
    while other is not sequence and other.behind is not None:
        other, _ = other.behind
    return other is sequence


def _slot(sequence: ActiveSequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
