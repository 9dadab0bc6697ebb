"""The eval callback: one stop per layer when the router has chosen, short stops while later parts are still loading.

llama.cpp asks about every node, in order, before computing it (``ggml_backend_sched_compute_splits``). A node answered
with True ends a chunk: the chunk is computed and the callback is called again with its result. Expertier stops

* after ``ffn_moe_topk-<layer>``, to read which experts the layer needs and to start loading them, and
* after a multiplication by one part of the experts while the next part is still on its way, so that compute and loading
  overlap.

When a multiplication by managed experts is asked about, its part is waited for: this is also the net that keeps any
architecture from computing on an absent expert, because experts nobody announced are then loaded on the spot. A node
that was asked about is computed whatever the answer is, so when its experts cannot be had it is turned into a no-op for
the rest of the call.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from expertier.budget import format_bytes
from expertier.errors import BudgetError, ExpertLoadError
from expertier.manager import Lease, OffloadManager, Phase
from expertier_llamacpp import ggml
from expertier_llamacpp.batches import BatchTokens
from expertier_llamacpp.gate_input import GateInput
from expertier_llamacpp.ggml import MEMORY, NAME_OFFSET, OP_OFFSET, SRC_OFFSET, WORDS
from expertier_llamacpp.router import RouterScores, write_ids
from expertier_llamacpp.signals import HeldSignals

if TYPE_CHECKING:
    from expertier.routing import AheadLoader
    from expertier.virtual import VirtualExperts
    from expertier.virtual.swapping import Swapper
    from expertier_llamacpp.recording import RouteRecording

_TOPK = b"ffn_moe_topk-"
_LAYER = re.compile(r"blk\.(\d+)\.")


class EvalHook:
    """Drives the offload manager from llama.cpp's eval callback.

    Parameters
    ----------
    manager : OffloadManager
        Loads and pins experts.
    tensors : mapping of int to (str, int)
        Address of every managed expert tensor to its name and stage.
    experts : mapping of int to int
        Layer to number of experts.
    ahead : AheadLoader, optional
        Starts loads ahead of the router.
    recording : RouteRecording, optional
        Told of all routes.
    virtual : VirtualExperts, optional
        Chooses stand-ins for absent experts.
    swapper : Swapper, optional
        Brings in absent experts between steps.

    Attributes
    ----------
    signals : HeldSignals
        To be entered around every llama.cpp call that runs the graph.
    error : BaseException or None
        What went wrong in the running call.
    listener : callable or None
        Told the layer, its routes and which rows of the batch are being computed (from, to) when a router has chosen.

    Notes
    -----
    Exceptions must not cross into C: they are kept in :attr:`error` and raised by :meth:`finish` in the thread that
    called llama.cpp, before anything reads the step's output.
    """

    def __init__(
        self,
        *,
        manager: OffloadManager,
        tensors: Mapping[int, tuple[str, int]],
        experts: Mapping[int, int],
        ahead: AheadLoader | None = None,
        recording: RouteRecording | None = None,
        virtual: VirtualExperts | None = None,
        swapper: Swapper | None = None,
    ) -> None:
        self._manager = manager
        self._recording = recording
        self._virtual = virtual
        self._swapper = swapper
        self._router = RouterScores() if virtual is not None else None
        self._experts = dict(experts)
        self._managed: dict[int, tuple[int, int]] = {}
        self._last_stage: dict[int, int] = {}
        for address, (name, stage) in tensors.items():
            match = _LAYER.match(name)
            assert match, name
            layer = int(match[1])
            self._managed[address] = (layer, stage)
            self._last_stage[layer] = max(self._last_stage.get(layer, 0), stage)
        self._ahead = ahead
        self._gate_input = GateInput()
        self._mul_mat_id = ggml.op_number("MUL_MAT_ID")
        self._no_op = ggml.op_number("NONE")
        self._disarmed: list[int] = []
        self.signals = HeldSignals()
        self._stopped_at = 0  # node that was answered with True and whose result has not been announced yet
        self._owed_layer = -1  # layer whose routes are known and whose last multiplication was not asked about yet
        # Nodes that may carry the chosen ids: a view of the sorted ids, or whatever a model computes them with.
        self._other_topk_ops = frozenset(ggml.op_number(name) for name in ("VIEW", "TOP_K", "GET_ROWS", "CPY", "CONT"))
        self._lease: Lease | None = None
        self._kept: list[Lease] = []  # of layers whose multiplications were asked about but not computed yet
        self._lease_is_whole = False
        self._stop_after: set[int] = set()  # layers known to be followed by one whose routes are not seen
        self._uncomputed = False  # whether there are such with the current lease
        self._topk_node = 0
        self._previous_layer = -1
        self._step_open = False
        self._batch: BatchTokens | None = None
        self._from = self._begun = 0  # rows of the batch that the running step computes; those behind are to come
        self._phase: Phase = "decode"
        self._quiet = False  # nothing can be absent in this call
        self.error: BaseException | None = None
        self.listener: Callable[[int, NDArray[np.int64], int, int], None] | None = None
        self.compute_node = 0  # a tensor of the last graph, by which its compute buffer is found
        self.callback = ggml.EvalCallback(self._on_eval)
        _catch_lost_exceptions()
        ggml.narrow_eval_callback(_TOPK, self._mul_mat_id)

    # ---- called around llama_decode

    def begin(self, batch: Any) -> None:
        """Prepare for a llama.cpp call that runs the graph over a ``llama_batch``."""
        self.error = None
        self.compute_node = 0
        self._previous_layer = self._owed_layer = -1
        self._stopped_at = 0
        self._batch = rows = BatchTokens(batch)
        self._begun = 0
        if self._recording is not None:
            self._recording.begin(rows)
        elif rows.count and rows.whole == "decode":
            # With everything resident there is nothing to stop for: a stop costs the threads a sleep and a waking.
            self._lease = self._manager.hold_all(rows.count)
            self._quiet = self._step_open = self._lease is not None
            if self._quiet and self._virtual is not None:
                self._virtual.begin_step(rows.count, "decode")
        if self._ahead is not None and self._ahead.follows_tokens:
            decode = bool(rows.count) and rows.whole == "decode"
            stand_ins = self._virtual is not None and self._virtual.allowed("decode")
            self._ahead.begin(rows.spans(), decode=decode and not self._quiet and not stand_ins)

    def finish(self) -> None:
        """End the call: unpin, and raise what went wrong inside it."""
        self._quiet = False
        self._batch = None
        if self.error is None and (self._stopped_at or self._owed_layer >= 0):
            self.error = _lost_callback()
        for node in self._disarmed:  # llama.cpp may use the same graph again
            MEMORY[node + OP_OFFSET] = self._mul_mat_id
        self._disarmed.clear()
        self._release()
        self._topk_node = 0
        if self._step_open:
            self._step_open = False
            self._end_step()
        error, self.error = self.error, None
        if error is not None and not isinstance(error, _InterruptedError):
            raise error

    def _release(self) -> None:
        for lease in (self._lease, *self._kept):
            if lease is not None:
                lease.release()
        self._lease = None
        self._kept.clear()
        self._uncomputed = False

    def _end_step(self) -> None:
        self._manager.end_step()
        if self._virtual is not None:
            self._virtual.end_step()
            if self._swapper is not None and self._virtual.substituting:
                self._swapper.after_step()
        if self._recording is not None:
            self._recording.end_step(failed=self.error is not None)

    # ---- the callback

    def _on_eval(self, node: int, ask: bool, _data: int | None) -> bool:
        if self._quiet:
            return not ask
        try:
            op = MEMORY[node + OP_OFFSET]
            if ask:
                if op == self._mul_mat_id:
                    stop = self._before_experts(node)
                elif op in self._other_topk_ops:
                    stop = ctypes.string_at(node + NAME_OFFSET, len(_TOPK)) == _TOPK
                else:
                    return self.error is not None
                if stop:
                    if self._stopped_at and self.error is None:
                        self.error = _lost_callback()
                    self._stopped_at = node
                return stop
            stopped_at, self._stopped_at = self._stopped_at, 0
            self._uncomputed = False
            if node != stopped_at and self.error is None:
                self.error = _lost_callback()
            if self.signals.interrupted and self.error is None:
                self.error = _InterruptedError()
            if self.error is None and op in self._other_topk_ops:
                self._after_topk(node)
            return self.error is None
        except BaseException as error:
            if self.error is None:
                self.error = error
            return ask  # ends the chunk at this node; without ask it ends the graph

    def _after_topk(self, node: int) -> None:
        layer = int(ctypes.string_at(node + NAME_OFFSET + len(_TOPK)))
        if layer not in self._experts:
            return
        routes = _read_ids(node)
        self._release()
        if not routes.size:
            return  # the last layer of a batch that wants no output
        if self._owed_layer >= 0:
            raise _lost_callback()
        if layer <= self._previous_layer or not self._step_open:
            if self._step_open:
                self._end_step()
            self._from, self._begun = self._begun, self._begun + len(routes)
            if self._batch is not None:
                self._phase = self._batch.phase(self._from, self._begun)
            else:  # somebody called llama_decode without us: nothing is known of sequences
                self._phase = "decode" if len(routes) == 1 else "prefill"
            self._manager.begin_step(len(routes), self._phase)
            if self._virtual is not None:
                # The last micro-batch of a prompt may be a single token.
                whole = self._phase if self._batch is None else self._batch.whole
                self._virtual.begin_step(len(routes), whole)
            if self._swapper is not None:
                self._swapper.begin_step(len(routes), self._phase)
            if self._recording is not None:
                self._recording.begin_step(len(routes), self._phase)
            self._step_open = True
        self._previous_layer = layer
        self._topk_node = self.compute_node = node
        self._manager.observe(layer, routes)
        if self._recording is not None:
            self._recording.layer(layer, routes, node)
        if self.listener is not None:
            self.listener(layer, routes, self._from, self._begun)
        chosen = self._stand_ins(layer, routes, node)
        self._lease = self._manager.acquire(layer, chosen, wait=False)
        self._lease_is_whole = False
        self._owed_layer = layer
        # What a prediction would load while stand-ins are allowed is mostly what they stand in for.
        if self._ahead is not None and not (self._virtual is not None and self._virtual.substituting):
            self._ahead.after_router(layer, routes, lambda: self._gate_input.of(node), decode=self._phase == "decode")

    def _stand_ins(self, layer: int, routes: NDArray[np.int64], node: int) -> NDArray[np.int64]:
        """Let resident experts stand in for absent ones: the ids in the graph become those that are returned."""
        virtual, router = self._virtual, self._router
        if virtual is None or router is None:
            return routes
        scores = functools.cache(lambda: router.of(node, routes))
        if self._swapper is not None:
            inputs = self._gate_input.of(node)
            fitting = inputs if inputs is not None and len(inputs) == len(routes) else None
            self._swapper.note(layer, routes, scores()[1], fitting)
        if not virtual.substituting:
            return routes
        resident = self._manager.resident(layer, arriving=not virtual.hard)
        chosen = virtual.choose(layer, routes, resident, scores)
        if chosen is not routes:
            write_ids(node, chosen)
        return chosen

    def _before_experts(self, node: int) -> bool:
        word = (node + SRC_OFFSET) >> 3
        managed = self._managed.get(WORDS[word])
        if managed is None:
            return self.error is not None
        try:
            if self.error is not None:
                raise self.error
            layer, stage = managed
            lease = self._lease
            announced = True
            if lease is None or lease.layer != layer or WORDS[word + 2] != self._topk_node:
                if not ggml.Tensor.from_address(WORDS[word + 2]).ne[1]:
                    return False  # the last layer of a micro-batch that wants no output multiplies nothing
                lease = self._whole_layer(layer)
                announced = False
            lease.wait(stage)
        except BaseException:
            MEMORY[node + OP_OFFSET] = self._no_op
            self._disarmed.append(node)
            raise
        if stage == self._last_stage[layer]:
            self._owed_layer = -1
        # Without a stop at the next layer's routes, its multiplications would be asked about before these are computed.
        if stage == self._last_stage[layer]:
            stop = not announced or layer in self._stop_after
        else:
            stop = not announced or not lease.ready(self._last_stage[layer])
        self._uncomputed = not stop
        return stop

    def _whole_layer(self, layer: int) -> Lease:
        """Load all experts of a layer whose routes were not seen, or are not the ids this node uses."""
        if self._lease is not None and self._lease.layer == layer and self._lease_is_whole:
            return self._lease
        if self._lease is not None and self._uncomputed:
            # Both layers must fit now; next time there is a stop between them.
            self._stop_after.add(self._lease.layer)
            both = ((self._lease.layer, len(self._lease)), (layer, self._experts[layer]))
            needed = sum(self._manager.bytes_of(*item) for item in both)
            if needed > self._manager.budget:  # waiting for room that we hold ourselves would never end
                raise BudgetError(
                    f"The routes of layer {layer} were not seen, so all its experts are needed beside those of layer "
                    f"{self._lease.layer} ({format_bytes(needed)}).",
                    "Run the step again, or raise the budget.",
                )
            self._kept.append(self._lease)
            self._lease = None
        else:
            self._release()
        self._lease = self._manager.acquire(layer, np.arange(self._experts[layer]), wait=False)
        self._lease_is_whole = True
        return self._lease


class _InterruptedError(BaseException):
    """The user gave up: the step ends early, and :attr:`EvalHook.signals` tells the caller."""


@functools.cache  # once: whoever replaces the hook later may call ours
def _catch_lost_exceptions() -> None:
    """Note what is raised before a callback's first instruction: by a signal handler, or by the recursion limit.

    ctypes hands it to ``sys.unraisablehook`` and llama.cpp an arbitrary answer. The step is then ended, and its caller
    gets the exception.
    """
    previous = sys.unraisablehook

    def hook(lost: Any) -> None:
        owner = getattr(lost.object, "__self__", None)
        if not isinstance(owner, EvalHook):
            previous(lost)
        elif owner.error is None:
            owner.error = lost.exc_value

    sys.unraisablehook = hook


def _lost_callback() -> ExpertLoadError:
    return ExpertLoadError(
        "An exception interrupted Expertier inside llama.cpp and went to a sys.unraisablehook that is not ours; the "
        "step's output was thrown away.",
        "Run the step again.",
    )


def _read_ids(node: int) -> NDArray[np.int64]:
    """Copy the ids out of a top-k node, shape ``(tokens, top_k)``."""
    tensor = ggml.Tensor.from_address(node)
    top_k, tokens = tensor.ne[0], tensor.ne[1]
    if not top_k or not tokens:
        return np.empty((0, 0), np.int64)
    if tokens == 1:
        return np.array([(ctypes.c_int32 * top_k).from_address(tensor.data)[:]], np.int64)
    stride = tensor.nb[1] // 4
    count = (tokens - 1) * stride + top_k
    flat = np.frombuffer((ctypes.c_int32 * count).from_address(tensor.data), np.int32)
    table = np.lib.stride_tricks.as_strided(flat, (tokens, top_k), (stride * 4, 4))
    return table.astype(np.int64)
