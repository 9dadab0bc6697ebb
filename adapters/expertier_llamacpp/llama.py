"""A drop-in for ``llama_cpp.Llama`` that keeps a bounded set of experts in memory."""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import llama_cpp

from expertier.budget import format_bytes, parse_budget
from expertier.catalog.gguf import build_catalog, read_layout
from expertier.catalog.routers import Weights, read_norms, read_routers
from expertier.catalog.sidecar import sidecar_directories
from expertier.catalog.types import Catalog
from expertier.config import OffloadOptions
from expertier.errors import (
    BudgetError,
    ExpertierError,
    ManagerClosedError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedOptionError,
)
from expertier.manager import ManagerConfig, OffloadManager
from expertier.planning.governor import GovernorSettings, PressureGovernor
from expertier.planning.memory import memory_left, process_memory
from expertier.quality.serving import QualityKeeper, read_quality_budget, words_of_losses
from expertier.residency.windows import WindowPool
from expertier.routing import AheadLoader, GainGate, Lookahead, ProfileKeeper, TraceRecorder
from expertier.routing.opening import gate_mode, open_predictor, policy_for
from expertier.routing.trace_header import trace_header
from expertier.virtual import VirtualExperts, VirtualSettings
from expertier.virtual.importance import Importance
from expertier.virtual.swapping import Swapper
from expertier_llamacpp import ggml
from expertier_llamacpp.buffer import ExpertBuffers
from expertier_llamacpp.callback import EvalHook
from expertier_llamacpp.exact import ExactRequests
from expertier_llamacpp.governor import BudgetGovernor, StepMemory
from expertier_llamacpp.guards import GuardedRequests
from expertier_llamacpp.loading import ModelLoader, open_files
from expertier_llamacpp.recording import RouteRecording
from expertier_llamacpp.router import refuse_unknown
from expertier_llamacpp.sidecar import choose_kernels
from expertier_llamacpp.signals import HeldSignals

logger = logging.getLogger("expertier")

_instances: weakref.WeakSet[Llama] = weakref.WeakSet()
_KEYWORD = "expert_"
_PATIENCE = 10.0  # seconds the end of the program waits for a step in another thread


@dataclass
class _Use:
    """Who uses a model: the lock is held while a step runs."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    thread: threading.Thread = field(default_factory=threading.current_thread)
    process: int = field(default_factory=os.getpid)


class Llama(ExactRequests, GuardedRequests):
    """``llama_cpp.Llama`` with its experts on storage and the most useful of them in memory.

    Takes every argument of ``llama_cpp.Llama`` and the options of :class:`expertier.config.OffloadOptions`, each with
    the prefix ``expert_``. Output is bit-identical to the stock class at the same settings.

    Parameters
    ----------
    model_path : str
        A GGUF file of a mixture-of-experts model; of a split model the first file.
    expert_budget : str or int, default "auto"
        Memory for experts: bytes, ``"8GiB"``, ``"25%"`` of all experts, or ``"auto"`` = all that the tightest memory
        limit (control group or free memory) leaves beside everything else.
    max_sequences : int, default 1
        Sequences the context can hold at a time, in one KV buffer of `n_ctx` tokens. This class itself uses one;
        :class:`expertier_llamacpp.BatchEngine` uses all.
    **kwargs
        Other ``expert_`` options and everything ``llama_cpp.Llama`` takes.

    Attributes
    ----------
    offload : OffloadManager
        ``.stats()`` tells what happens, ``.resize()`` changes the budget while running.
    catalog : Catalog
        The model's experts.
    recorder : TraceRecorder or None
        Writes the routes where ``expert_trace`` says.
    virtual : VirtualExperts or None
        Stand-ins for absent experts where ``expert_virtual_bias`` is given: ``.bias`` may be set while running,
        ``.stats()`` tells what was replaced.
    quality : QualityKeeper or None
        Steers the bias where ``expert_quality_budget`` is a percentage; ``.stats(llm.virtual)`` tells where it stands.

    Raises
    ------
    ExpertierError
        A subclass with the reason and the way out: see :mod:`expertier.errors`.

    Examples
    --------
    >>> from expertier_llamacpp import Llama
    >>> llm = Llama("qwen3-30b-a3b-q4_k_m.gguf", expert_budget="8GiB", n_ctx=4096)
    >>> llm("The capital of France is", max_tokens=8)["choices"][0]["text"]
    >>> llm.offload.stats().decode.hit_ratio
    """

    offload: OffloadManager
    catalog: Catalog
    recorder: TraceRecorder | None
    virtual: VirtualExperts | None
    quality: QualityKeeper | None

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(_KEYWORD)}
        self._closing: list[Callable[[], None]] = []
        self._use = _Use()
        sequences = kwargs.pop("max_sequences", 1)
        self._offload_arguments = own if sequences == 1 else {**own, "max_sequences": sequences}
        ggml.self_check()
        options = OffloadOptions.from_mapping({name[len(_KEYWORD) :]: value for name, value in own.items()})
        options.check_trace()
        _refuse_options(kwargs, sequences)
        layouts = read_layout(model_path)
        self.catalog = build_catalog(layouts)
        parse_budget(options.budget, self.catalog.total_expert_bytes)  # a slip of the pen is told before any work
        options, self.quality = read_quality_budget(options, self.catalog)
        settings = VirtualSettings.from_options(options, top_k=min(layer.top_k for layer in self.catalog.layers))
        self.virtual = None
        if settings is not None:
            refuse_unknown(self.catalog.architecture)
            metadata: Mapping[str, Any] = layouts[0].metadata
            settings.check_groups(int(metadata.get(f"{self.catalog.architecture}.expert_group_count", 0)))
            self.virtual = VirtualExperts([layer.layer for layer in self.catalog.layers], settings)
        try:
            self._construct(model_path, kwargs, options, layouts, sequences)
        except BaseException:
            self.close()
            raise
        _instances.add(self)
        if kwargs.get("verbose", True):
            print(self.mode_line(), file=sys.stderr)
        logger.info("%s", self.mode_line())

    def _construct(
        self, model_path: str, kwargs: dict[str, Any], options: OffloadOptions, layouts: Any, sequences: int
    ) -> None:
        catalog = self.catalog
        self._kernels = kernels = choose_kernels(catalog, layouts, options)
        files = open_files((*catalog.files, *kernels.files), options.io_mode)
        self._closing.extend(file.close for file in files.values())
        pool = WindowPool(kernels.layers, files, kernels.check_for)
        hard = self.virtual is not None and self.virtual.hard
        token = [layer.top_k * pool.slot_bytes(layer.layer) for layer in catalog.layers]
        smallest = sum(token) if hard else max(token)
        largest = sum(layer.experts * pool.slot_bytes(layer.layer) for layer in catalog.layers)
        asked = parse_budget(options.budget, largest)
        directories = sidecar_directories(catalog.path.parent, options.sidecar_dir)
        routers = functools.cache(lambda: read_routers(catalog, layouts))
        try:
            predictor = open_predictor(options.predictor, catalog, directories, routers)
            manager = OffloadManager(
                experts={layer.layer: layer.experts for layer in catalog.layers},
                top_k={layer.layer: layer.top_k for layer in catalog.layers},
                pool=pool,
                budget=smallest if asked is None else min(asked, largest),
                config=ManagerConfig(
                    policy=policy_for(options, predictor, lossy=self.virtual is not None),
                    half_life=options.half_life,
                    io_threads=options.io_threads,
                    fill=not hard,  # its swaps fill free room, too, and let nobody notice
                    every_layer=hard,
                ),
            )
        except BaseException:
            pool.close()
            raise
        self._closing.insert(0, manager.close)
        self.offload = manager
        keeper = ProfileKeeper(options.profile, catalog, directories, manager)
        self._closing.insert(0, keeper.close)
        self.recorder = None
        if options.trace is not None:
            width = int(layouts[0].metadata.get(f"{catalog.architecture}.embedding_length", 0))
            header = trace_header(
                catalog,
                engine="llama.cpp",
                pool=pool,
                weights=True,
                tokens=options.trace_tokens == "on",
                hidden_size=width if options.trace_hidden else 0,
                routers=routers(),
            )
            self.recorder = TraceRecorder(options.trace, header)
            self._closing.append(self.recorder.close)
        buffers = ExpertBuffers(pool.placements, kernels.repacked, catalog.idle_experts)
        self._buffers = buffers  # llama.cpp calls into it until the model is freed

        def on_loaded(tensors: dict[int, tuple[str, int]]) -> Any:
            experts = {layer.layer: layer.experts for layer in catalog.layers}
            ahead = AheadLoader(
                manager=manager,
                experts=experts,
                lookahead=_make_lookahead(catalog, routers(), layouts) if options.lookahead != "off" else None,
                gate=GainGate(gate_mode(options.lookahead, predictor)),
                predictor=predictor,
                listener=manager.forecast if manager.config.policy == "predictive" else None,
                # llama.cpp drops rows without output before the last layer's experts: of a prompt one row is left.
                last_is_narrow=True,
            )
            self._ahead = ahead
            keeper.follow(ahead)
            recording = RouteRecording(self.recorder, hidden_every=options.trace_hidden) if self.recorder else None
            self._hook = EvalHook(
                manager=manager,
                tensors=tensors,
                experts=experts,
                ahead=ahead,
                recording=recording,
                virtual=self.virtual,
                swapper=Swapper(manager, Importance(experts)) if hard else None,
            )
            return self._hook.callback

        loader = ModelLoader(
            path=catalog.path,
            files=files.values(),
            buffers=buffers,
            extra_buffer_types=kernels.extra_buffer_types,
            on_loaded=on_loaded,
            sequences=sequences,
        )
        before = process_memory()
        try:
            with loader.installed():
                super().__init__(str(model_path), **kwargs)
        except ExpertierError:
            raise
        except ValueError as error:
            if loader.error is not None:
                raise loader.error from error
            raise ModelFormatError(f"llama.cpp could not set up {model_path}: {error}") from error
        self._governor: BudgetGovernor | None = None
        promised = max(0, process_memory().untouched - before.untouched)
        if asked is not None:
            _check_machine(manager.budget, promised)
        else:
            self._governor = BudgetGovernor(
                manager,
                StepMemory.of(catalog, promised=promised, n_ubatch=self.context_params.n_ubatch),
                margin=_margin(options),
                smallest=smallest,
                largest=largest,
                resting=sequences,
            )
        self._pressure = self._watch_pressure(options, smallest, largest)
        if self.quality is not None and self.virtual is not None:
            self.quality.attach(self.virtual, lambda: manager.budget, largest, definite=asked is not None)
        self._guard_compute()
        manager.warm_up()

    def _watch_pressure(self, options: OffloadOptions, smallest: int, largest: int) -> PressureGovernor | None:
        """Start the governor where it was asked for."""
        if options.governor == "off":
            return None
        manager, automatic = self.offload, self._governor
        limit = memory_left().limit
        pressure = PressureGovernor(
            GovernorSettings.usual(
                smallest=smallest,
                largest=manager.budget if automatic is None else largest,
                limit=limit,
                margin=None if automatic is None else _margin(options),
            ),
            resize=manager.resize if automatic is None else automatic.cap,
            held=lambda: manager.stats().resident_bytes,
        )
        self._closing.insert(0, pressure.close)
        pressure.start()
        return pressure

    def resize(self, budget: str | int) -> int:
        """Change the memory for experts while the model runs, from any thread.

        Parameters
        ----------
        budget : str or int
            As ``expert_budget``; ``"auto"`` only where the model was loaded with it.

        Returns
        -------
        int
            The new budget in bytes, once experts hold no more than that.

        Raises
        ------
        BudgetError
            It is no amount, cannot hold one token's experts, or memory does not leave it; the old one stays in force.
        """
        stats, automatic = self.offload.stats(), self._governor
        asked = parse_budget(budget, stats.total_bytes)
        if asked is None and automatic is None:
            raise BudgetError("Budget 'auto' cannot be turned on later.", "Load the model with it, or give an amount.")
        asked = stats.total_bytes if asked is None else min(asked, stats.total_bytes)
        if automatic is None and asked > stats.budget_bytes:
            _check_machine(asked - stats.resident_bytes, 0)
        change = self.offload.resize if automatic is None else automatic.cap
        try:
            change(asked)
        except BudgetError:  # too little for the running step, or for any
            with self._use.lock:
                change(asked)
        if self._pressure is not None:
            self._pressure.ask(asked)
        return self.offload.budget

    def _guard_compute(self) -> None:
        """Raise what went wrong inside the graph before anyone looks at the output."""
        # Nothing here may refer to self: a model that nobody refers to any more is freed at once, not by the collector.
        hook, governor, use = self._hook, self._governor, self._use
        context: Any = self._ctx  # methods are shadowed on the instance: the class belongs to llama_cpp

        def guarded(stock: Callable[[Any], None]) -> Callable[[Any], None]:
            def compute(batch: Any) -> None:
                if os.getpid() != use.process:
                    raise ManagerClosedError(
                        f"The model belongs to process {use.process}; a forked child has no I/O threads for it.",
                        "Load the model in the child, or start the child with multiprocessing's spawn method.",
                    )
                with use.lock, hook.signals:
                    use.thread = threading.current_thread()
                    if governor is not None:
                        governor.before(batch.n_tokens())
                    try:
                        hook.begin(batch.batch)
                        stock(batch)
                    finally:
                        hook.finish()
                    if governor is not None:
                        governor.after(hook.compute_node)

            return compute

        context.decode = guarded(context.decode)
        context.encode = guarded(context.encode)

    def mode_line(self) -> str:
        """One line that says what is being done."""
        stats = self.offload.stats()
        return (
            f"expertier: {self.catalog.architecture}, {stats.total_experts} experts of "
            f"{format_bytes(self.catalog.largest_expert_bytes)}, budget {format_bytes(stats.budget_bytes)} of "
            f"{format_bytes(stats.total_bytes)} ({100 * stats.budget_bytes / stats.total_bytes:.0f} %), "
            f"policy {self.offload.config.policy}, prediction by {self._ahead.words()}, {self._kernels.words}, "
            f"{words_of_losses(self.virtual, self.quality)}"
        )

    def __getstate__(self) -> dict[str, Any]:
        stock: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**stock, **self._offload_arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def close(self) -> None:
        """Free the model, stop the I/O threads and give all memory back."""
        with self._use.lock, HeldSignals():  # freeing a model calls back into Python
            if hasattr(self, "_stack"):
                super().close()  # first the model: it still points into our memory
            while self._closing:
                self._closing.pop(0)()

    def __del__(self) -> None:
        if hasattr(self, "_closing"):
            self.close()


def _disown_all() -> None:
    for instance in list(_instances):
        instance._use.lock = threading.RLock()  # a thread that is not in the child may have held it
        instance.offload.disown()
        if instance.recorder is not None:
            instance.recorder.disown()


os.register_at_fork(after_in_child=_disown_all)


@atexit.register
def _close_all() -> None:
    # Freeing a model calls back into Python, which is not possible any more when the interpreter is gone.
    for instance in list(_instances):
        if instance._use.thread is threading.main_thread() or not instance._use.thread.is_alive():
            instance.close()
            continue
        # A daemon thread may be generating at this moment, and nobody can wait for all of it. It gets to the end of its
        # step, cannot begin another, and what it uses is left to the system: not even the end of the interpreter may
        # free it.
        instance._use.lock.acquire(timeout=_PATIENCE)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(instance))


def _margin(options: OffloadOptions) -> int:
    """Bytes that budget "auto" leaves alone: the interpreter's growth, and page tables (4 KiB per 2 MiB of experts)."""
    limit = memory_left().left
    if options.margin == "auto":
        return (32 << 20) + limit // 100
    return parse_budget(options.margin, limit) or 0


def _check_machine(budget: int, promised: int) -> None:
    """Refuse a budget that the machine cannot keep: the kernel would kill the process in the middle of an answer."""
    bound = memory_left()
    if budget > bound.left - promised:
        raise BudgetError(
            f"A budget of {format_bytes(budget)} exceeds what {bound.source} has left for experts "
            f"({format_bytes(max(0, bound.left - promised))}).",
            "Lower the budget, or use 'auto' to take what there is.",
        )


def _refuse_options(kwargs: dict[str, Any], sequences: int) -> None:
    most = llama_cpp.llama_max_parallel_sequences()
    if isinstance(sequences, bool) or not isinstance(sequences, int) or not 1 <= sequences <= most:
        raise UnsupportedOptionError(
            f"max_sequences={sequences!r} is not possible.", f"llama.cpp holds 1 to {most} sequences."
        )
    if kwargs.get("n_gpu_layers"):
        raise UnsupportedOptionError(
            "n_gpu_layers > 0 is not supported: Expertier manages experts in main memory.", "Leave n_gpu_layers at 0."
        )
    if kwargs.get("vocab_only"):
        raise UnsupportedOptionError("vocab_only loads no experts.", "Use llama_cpp.Llama for it.")
    if (adapter := kwargs.get("lora_path")) and not os.path.isfile(adapter):  # llama.cpp would go on without it
        raise ModelNotFoundError(f"There is no LoRA adapter {adapter}.", "Check lora_path.")


def _make_lookahead(catalog: Catalog, routers: Mapping[int, Weights], layouts: Any) -> Lookahead | None:
    """The lookahead, or ``None`` where a model does not have its routers in the usual place."""
    if routers.keys() != catalog.by_layer.keys():
        return None
    top_k = {layer.layer: layer.top_k for layer in catalog.layers}
    return Lookahead(gates=routers, norms=read_norms(catalog, layouts), top_k=top_k)
