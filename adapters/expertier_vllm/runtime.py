"""One model in one worker process: its expert layers, their memory, and what happens when a layer computes."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.budget import format_bytes, parse_budget
from expertier.catalog.pack import Pack, PackKey, find_or_build
from expertier.catalog.routers import read_routers
from expertier.catalog.safetensors import build_catalog, content_digest, read_layout
from expertier.catalog.sidecar import sidecar_directories
from expertier.catalog.types import LayerExperts
from expertier.errors import (
    ExpertierError,
    ExpertLoadError,
    ModelFormatError,
    RouterScoresError,
    UnsupportedModelError,
    UnsupportedOptionError,
)
from expertier.manager import Lease, ManagerConfig, OffloadManager, Phase
from expertier.quality.serving import describe_losses, read_quality_budget, words_of_losses
from expertier.residency.windows import WindowPool
from expertier.routing import AheadLoader, GainGate, Lookahead, ProfileKeeper, RoutePredictor, Span, TraceRecorder
from expertier.routing.opening import gate_mode, open_predictor, policy_for
from expertier.routing.trace_header import trace_header
from expertier.storage import StorageFile
from expertier.virtual import VirtualExperts, VirtualSettings
from expertier.virtual.importance import Importance
from expertier.virtual.swapping import Swapper
from expertier_vllm.checkpoint import CheckpointFiles, SourceReader
from expertier_vllm.grouping import token_groups
from expertier_vllm.halves import compute_in_halves
from expertier_vllm.loading import (
    announce,
    find_sidecar,
    read_rows,
    sidecar_name,
)
from expertier_vllm.options import VllmOptions
from expertier_vllm.recording import StepRecording
from expertier_vllm.route_log import RouteLog
from expertier_vllm.slots import ExpertSlots, usual_host_bytes
from expertier_vllm.stage import ExpertStage, layers_in_order
from expertier_vllm.stand_ins import insisted, stand_in
from expertier_vllm.worker_budget import WorkerBudget

logger = logging.getLogger("expertier")


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What a runtime knows of the worker it lives in.

    Attributes
    ----------
    checkpoint : Path
        Directory of the checkpoint.
    rank : int
        Of the worker, in the whole server.
    local_workers : int
        Workers on this machine, which share its memory.
    in_step : bool
        Whether other workers wait for this one, in every layer or after the last.
    shard : str
        Names the worker's part of every layer, e.g. ``tp 0 of 2``.
    library : str
        Engine and version, e.g. ``vllm 0.32.0``.
    device : str
        Type of the device on which layers compute. On any but ``cpu`` experts are in slots.
    """

    checkpoint: Path
    rank: int
    local_workers: int
    in_step: bool
    shard: str
    library: str
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class StepKind:
    """What kind of forward pass runs.

    Attributes
    ----------
    real : bool
        Whether it serves requests; warm-ups and profiling runs do not.
    decode : bool
        Whether every request contributes one token.
    tokens : int or None
        So many tokens are the requests'; what follows is padding, which graphs of fixed sizes need. ``None``: all are.
    asked, prompt : ndarray of bool, shape (tokens,), or None
        Tokens of requests that asked for exactness, and tokens of prompts; ``None`` where nobody needs to know.
    """

    real: bool
    decode: bool
    tokens: int | None = None
    asked: NDArray[np.bool_] | None = None
    prompt: NDArray[np.bool_] | None = None

    def exact(self, tokens: int, *, prompts: bool) -> NDArray[np.bool_] | None:
        """Which of so many tokens may not be given stand-ins, those of `prompts` among them; ``None``: all may."""
        if self.asked is None or self.prompt is None:
            return None
        exact = self.asked | self.prompt if prompts else self.asked
        if not exact.any():
            return None
        return np.pad(exact, (0, max(0, tokens - len(exact))), constant_values=True)  # what is beyond is padding


class Runtime:
    """Expert layers of one model in one worker.

    Parameters
    ----------
    options : VllmOptions
        What the user set.
    facts : WorkerFacts
        Where this is.
    step_kind : callable
        Tells about the running forward pass.

    Attributes
    ----------
    manager : OffloadManager
        Exists once the last layer has been loaded.
    files : CheckpointFiles
        The checkpoint, while it loads.
    virtual : VirtualExperts or None
        Stand-ins for absent experts, where they were asked for.
    budget : WorkerBudget
        What the experts may hold; exists with the manager.
    failure : ExpertLoadError or RouterScoresError or None
        With workers in step: why this one's part of the forward pass is worthless. Whoever runs passes resets it.
    route_log : RouteLog or None
        Where the scheduler learns what requests use; see :meth:`log_routes`.

    Notes
    -----
    Life: layers are added while the model is built; :meth:`sources` decides at the first weight whether a sidecar is
    there; :meth:`loaded` is called for every layer, and the last one makes sidecar, pool and manager;
    :meth:`finish_loading` checks that nothing was missed; :meth:`serve` when the KV cache has its memory.
    """

    manager: OffloadManager
    budget: WorkerBudget

    def __init__(self, options: VllmOptions, facts: WorkerFacts, step_kind: Callable[[], StepKind]) -> None:
        self.facts = facts
        self._step_kind = step_kind
        self._stages: list[ExpertStage] = []
        self._waiting: set[str] = set()
        self._layout = read_layout(facts.checkpoint)
        self._catalog = build_catalog(self._layout)
        self._routers = functools.cache(functools.partial(read_routers, self._catalog))
        offload, self._quality = read_quality_budget(options.offload, self._catalog)
        self.options = replace(options, offload=offload)
        self.files = CheckpointFiles(self._layout, self._catalog)
        self.failure: ExpertLoadError | RouterScoresError | None = None
        self.route_log: RouteLog | None = None
        self.virtual: VirtualExperts | None = None
        self._swapper: Swapper | None = None  # in hard mode
        self._wished: tuple[NDArray[np.int64], torch.Tensor] | None = None  # what it is not told yet of a layer
        self._substituting = False
        self._exact: NDArray[np.bool_] | None = None  # tokens of the step that may not be given stand-ins
        self._slots: ExpertSlots | None = None
        self._looked = False
        self._pack: Pack | None = None
        self._ahead: AheadLoader | None = None
        self._recording: StepRecording | None = None
        self._spans: Sequence[Span] = ()  # tokens of the forward pass that has been announced
        self._kind = StepKind(real=False, decode=False)
        self._step_open = False
        self._everything: Lease | None = None  # all experts are resident, and pinned for this step
        self._serving = False

    # ---- building and loading

    @property
    def in_slots(self) -> bool:
        """Whether experts are in slots over host memory, and not in windows of address space."""
        return self.options.host_budget is not None or self.facts.device != "cpu"

    def add(self, stage: ExpertStage) -> None:
        """Take a layer in; called when it has been constructed."""
        stage.runtime = self
        stage.top_k = int(stage.module.top_k)
        self._stages.append(stage)
        self._waiting.add(stage.name)

    def sources(self) -> CheckpointFiles | None:
        """Where to look checkpoint tensors up; ``None`` when an earlier start has left a sidecar."""
        if not self._looked:
            key = self._key
            self._pack = find_sidecar(self._directories(), sidecar_name(self.facts.checkpoint, key), key)
            self._looked = True
        return None if self._pack is not None else self.files

    @functools.cached_property  # reads samples of all weights; asked for only when all layers have been added
    def _key(self) -> PackKey:
        layers = sorted(stage.layer for stage in self._stages)
        method = self._stages[0].method
        kernel = getattr(method, "experts_cls", None)
        layout = (
            f"{type(method).__name__} {getattr(kernel, '__name__', '')} {getattr(kernel, 'isa', '')}, "
            f"{self.facts.shard}, layers {layers[0]}..{layers[-1]}, {self._stages[0].module.params_dtype}"
        )
        return PackKey(
            model=self._catalog.fingerprint,
            content=content_digest(self._layout),
            layout=layout,
            library=self.facts.library,
        )

    def _directories(self) -> list[Path]:
        return sidecar_directories(self.facts.checkpoint, self.options.offload.sidecar_dir)

    def loaded(self, stage: ExpertStage) -> None:
        """Note that a layer's weights have been handed out; the last layer completes the experts."""
        if stage.name not in self._waiting:
            raise ExpertierError("Weights cannot be loaded a second time under Expertier.", "Start a new server.")
        stage.set_up()
        self._waiting.discard(stage.name)
        if not self._waiting:
            self._complete()

    def _complete(self) -> None:
        self._stages = layers_in_order(self._stages)
        key = self._key
        parts = {stage.layer: stage.parts() for stage in self._stages}
        offload = self.options.offload
        with contextlib.closing(SourceReader(offload.io_mode)) as reader:
            pack = self._pack or find_or_build(
                self._directories(),
                sidecar_name(self.facts.checkpoint, key),
                key=key,
                parts=[part for stage in self._stages for part in parts[stage.layer]],
                produce=lambda: (view for stage in self._stages for view in stage.produce(reader)),
                announce=announce,
            )
        self.files.close()
        self._pack = pack
        layers = pack.layers(
            LayerExperts(layer=stage.layer, experts=stage.experts, top_k=stage.top_k, parts=tuple(parts[stage.layer]))
            for stage in self._stages
        )
        file = StorageFile(pack.path, offload.io_mode)
        weakref.finalize(self, file.close)
        self._make_manager(layers, pack, file)

    def _make_manager(self, layers: tuple[LayerExperts, ...], pack: Pack, file: StorageFile) -> None:
        moving = {f"{stage.name}.{row.param}" for stage in self._stages for row in stage.rows if row.moves}
        managed = [
            LayerExperts(
                layer=layer.layer,
                experts=layer.experts,
                top_k=layer.top_k,
                parts=tuple(part for part in layer.parts if part.name in moving),
            )
            for layer in layers
        ]
        resident = [
            {
                part.name: read_rows(file, pack, part, stage.row(part.name).dtype)
                for part in layer.parts
                if part.name not in moving
            }
            for stage, layer in zip(self._stages, layers, strict=True)
        ]
        offload = self.options.offload
        if self.in_slots:
            self._make_slots(managed, resident, pack, file)
            return
        settings = VirtualSettings.from_options(offload, top_k=min(stage.top_k for stage in self._stages))
        if settings is not None:
            self.virtual = VirtualExperts([stage.layer for stage in self._stages], settings)
        hard = self.virtual is not None and self.virtual.hard
        pool = WindowPool(managed, {pack.path: file}, pack.check, packed=True)
        for stage in self._stages:
            stage.spacing = pool.spacing[stage.layer]
        token = [layer.top_k * pool.slot_bytes(layer.layer) for layer in managed]
        smallest = sum(token) if hard else max(token)
        whole = [layer.experts * pool.slot_bytes(layer.layer) for layer in managed]
        self.budget = WorkerBudget(
            offload,
            smallest=smallest,
            largest=sum(whole),
            one_layer=max(smallest, *whole),
            always=sum(stage.resident_bytes for stage in self._stages),
            sharers=self.facts.local_workers,
        )
        try:
            self._predictor = self._open_predictor()
            self.manager = OffloadManager(
                experts={layer.layer: layer.experts for layer in managed},
                top_k={layer.layer: layer.top_k for layer in managed},
                pool=pool,
                budget=self.budget.first,
                config=ManagerConfig(
                    policy=policy_for(offload, self._predictor, lossy=settings is not None),
                    half_life=offload.half_life,
                    io_threads=offload.io_threads,
                    fill=not hard,
                    every_layer=hard,
                ),
            )
        except BaseException:
            pool.close()
            raise
        weakref.finalize(self, self.manager.close)
        self.budget.attach(self.manager)
        if hard:
            self._swapper = Swapper(self.manager, Importance({layer.layer: layer.experts for layer in managed}))
        self._keep_profile()
        if offload.trace is not None and self.facts.rank == 0:
            if not self._sees_all_layers:
                raise UnsupportedOptionError(
                    "A trace needs all layers in one worker.", "Record with tensor instead of pipeline parallelism."
                )
            header = trace_header(
                self._catalog,
                engine="vllm",
                pool=pool,
                weights=True,
                tokens=offload.trace_tokens == "on",
                hidden_size=int(self._stages[0].module.hidden_size) if offload.trace_hidden else 0,
                routers=self._routers(),
            )
            recorder = TraceRecorder(offload.trace, header)
            weakref.finalize(self, recorder.close)
            self._recording = StepRecording(recorder, hidden_every=offload.trace_hidden)
        self._slot = {layer.layer: pool.slot_bytes(layer.layer) for layer in managed}
        self._last = len(self._stages) - 1
        self._by_layer = {stage.layer: stage for stage in self._stages}
        addresses = {name: placement.address for name, placement in pool.placements.items()}
        for stage, rows in zip(self._stages, resident, strict=True):
            stage.settle(addresses, rows)

    def _make_slots(
        self,
        layers: Sequence[LayerExperts],
        resident: Sequence[Mapping[str, torch.Tensor]],
        pack: Pack,
        file: StorageFile,
    ) -> None:
        """Put the experts into slots; what is not known to work with them was refused before."""
        offload = self.options.offload
        sizes = {layer.layer: layer.expert_bytes for layer in layers}
        total = sum(layer.total_bytes for layer in layers)
        self.budget = WorkerBudget(
            offload,
            smallest=sum(layer.top_k * layer.expert_bytes for layer in layers),  # every layer has slots of its own
            largest=total,
            one_layer=max(layer.total_bytes for layer in layers),
            always=sum(stage.resident_bytes for stage in self._stages),
            sharers=self.facts.local_workers,
            on_host=self.facts.device == "cpu",
        )
        host = self.options.host_budget
        host_bytes = (
            usual_host_bytes(total, self.facts.local_workers) if host is None else parse_budget(str(host), total)
        )
        assert host_bytes is not None and not self.budget.automatic  # "auto" was refused with the options
        self._predictor = self._open_predictor()
        self._slots = ExpertSlots(
            self._stages,
            layers,
            {pack.path: file},
            pack,
            resident,
            device=self._stages[0].device,
            device_bytes=self.budget.first,
            host_bytes=host_bytes,
            config=ManagerConfig(
                policy=policy_for(offload, self._predictor, lossy=False),
                half_life=offload.half_life,
                io_threads=offload.io_threads,
                fill=True,
            ),
        )
        self.manager = self._slots.tier.manager
        weakref.finalize(self, self.manager.close)
        self.budget.attach(self.manager, self._slots.tier.resize)
        self._keep_profile()
        self._slot = sizes
        self._last = len(self._stages) - 1

    def _keep_profile(self) -> None:
        profile = self.options.offload.profile if self.facts.rank == 0 and self._sees_all_layers else "off"
        self._keeper = ProfileKeeper(profile, self._catalog, self._directories(), self.manager)

    @property
    def _sees_all_layers(self) -> bool:
        """Whether this worker is no mere stage of a pipeline."""
        return {stage.layer for stage in self._stages} == {layer.layer for layer in self._catalog.layers}

    def _open_predictor(self) -> RoutePredictor | None:
        asked = self.options.offload.predictor
        if self._sees_all_layers:
            return open_predictor(asked, self._catalog, self._directories(), self._routers)
        if asked not in ("auto", "off"):
            raise UnsupportedOptionError(
                "A predictor of routes needs all layers in one worker.", "Use tensor instead of pipeline parallelism."
            )
        return None

    def finish_loading(self, norms: Mapping[int, NDArray[np.float32]]) -> None:
        """Prepare for serving when the model is complete.

        Parameters
        ----------
        norms : mapping of int to ndarray of float32, shape (hidden,)
            Weights of the norm before the router, by layer.
        """
        if not self._stages:
            raise UnsupportedModelError(
                "The layers of this worker have no routed experts.", "Use fewer pipeline stages."
            )
        if self._waiting:
            raise ModelFormatError(f"vLLM loaded no weights for {min(self._waiting)}.", "Fetch the checkpoint again.")
        offload = self.options.offload
        if self.virtual is not None and self._quality is not None:
            definite = not self.budget.automatic
            self._quality.attach(self.virtual, lambda: self.manager.budget, self.budget.largest, definite=definite)
        lookahead = self._make_lookahead(norms) if offload.lookahead != "off" else None
        self._routers.cache_clear()
        self._ahead = AheadLoader(
            manager=self.manager,
            experts={stage.layer: stage.experts for stage in self._stages},
            lookahead=lookahead,
            gate=GainGate(gate_mode(offload.lookahead, self._predictor)),
            predictor=self._predictor,
            listener=self.manager.forecast if self.manager.config.policy == "predictive" else None,
        )
        self._keeper.follow(self._ahead)

    def _make_lookahead(self, norms: Mapping[int, NDArray[np.float32]]) -> Lookahead | None:
        """The lookahead of this worker's layers, or ``None`` where the checkpoint has a router in no usual place."""
        top_k = {stage.layer: stage.top_k for stage in self._stages}
        gates = {layer: gate for layer, gate in self._routers().items() if layer in top_k}
        if gates.keys() != top_k.keys():
            return None
        width = next(iter(gates.values())).shape[1]
        fitting = {layer: norm for layer, norm in norms.items() if norm.shape == (width,)}
        return Lookahead(gates=gates, norms=fitting, top_k=top_k)

    def log_routes(self) -> None:
        """Keep the routes of every step for the scheduler."""
        stages = self._stages
        self.route_log = RouteLog(
            self.manager,
            [stage.layer for stage in stages],
            [stage.experts for stage in stages],
            max(stage.top_k for stage in stages),
        )

    def serve(self, promised: int = 0) -> None:
        """Take the final budget (:meth:`WorkerBudget.settle`) and say what runs."""
        self.budget.settle(promised)
        self._serving = True
        print(self._mode_line(), file=sys.stderr, flush=True)

    # ---- what others see

    def set_virtual(self, bias: float, protect: int) -> dict[str, Any]:
        """Change what residency is worth (0 is exact) and how many first experts of a token are never replaced.

        Returns
        -------
        dict
            Of :class:`expertier.virtual.VirtualStats`.

        Raises
        ------
        UnsupportedOptionError
            Without stand-ins from the start: routers ask for them only then.
        VirtualExpertsError
            The bias is not one.
        """
        if self.virtual is None:
            raise UnsupportedOptionError(
                "The model was loaded without stand-ins.", "Give a virtual bias, which may be 0."
            )
        self.virtual.bias = bias
        self.virtual.settings = replace(self.virtual.settings, protect=protect)
        return asdict(self.virtual.stats())

    def stats(self) -> dict[str, Any]:
        """Counters as plain data: :meth:`expertier.telemetry.Stats.as_dict`, ``rank``, ``mode``, and what was lost.

        Bytes count what stays resident of all experts, too.
        """
        counters = self.manager.stats().as_dict()
        for name in ("budget_bytes", "resident_bytes", "peak_resident_bytes", "total_bytes"):
            counters[name] += self.budget.always
        return {
            **counters,
            "rank": self.facts.rank,
            "mode": self._mode_line() if self._serving else "",
            "virtual": None,
            **describe_losses(self.virtual, self._quality),
            **({} if self._slots is None else {"tier": asdict(self._slots.tier.stats())}),
        }

    def _mode_line(self) -> str:
        stats = self.manager.stats()
        budget, total = stats.budget_bytes + self.budget.always, stats.total_bytes + self.budget.always
        assert self._pack is not None
        return (
            f"expertier: {self._catalog.architecture}, {self.facts.shard}, {stats.total_experts} experts of "
            f"{format_bytes(max(self._slot.values()))} ({self._stages[0].format}), "
            f"budget {format_bytes(budget)} of {format_bytes(total)} ({100 * budget / total:.0f} %), "
            f"policy {self.manager.config.policy}, prediction by {self._ahead.words() if self._ahead else 'nothing'}, "
            f"{self._slots.words() + ', ' if self._slots else ''}sidecar {self._pack.path}, "
            f"{words_of_losses(self.virtual, self._quality)}"
        )

    def note(self, values: Mapping[str, Any]) -> None:
        """Leave measurements in the trace."""
        if self._recording is not None:
            self._recording.recorder.note(values)

    def end_trace(self) -> None:
        """Complete the trace; nothing is recorded from then on."""
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.recorder.close()

    def close(self) -> None:
        """Stop I/O and give all memory back; no layer may compute any more."""
        if hasattr(self, "budget"):
            self.budget.close()
        if hasattr(self, "_keeper"):
            self._keeper.close()
        self.end_trace()
        if hasattr(self, "manager"):
            self.manager.close()

    # ---- computing

    def announce(self, spans: Sequence[Span]) -> None:
        """Take note of the tokens that the next forward pass computes, and load ahead for it.

        Parameters
        ----------
        spans : sequence of Span
            One for each of its requests, in the order of the batch.
        """
        self._spans = spans
        if self._ahead is not None and self._ahead.follows_tokens:
            decode = all(span.tokens is not None and len(span.tokens) == 1 for span in spans)
            # What a prediction would load while stand-ins are allowed is mostly what they stand in for.
            lossy = self.virtual is not None and self.virtual.allowed("decode")
            self._ahead.begin(spans, decode=decode and not lossy and not self.manager.complete)

    def choose(
        self, stage: ExpertStage, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let resident experts stand in for absent ones; called before :meth:`run` where virtual experts are on.

        Parameters
        ----------
        stage : ExpertStage
            The layer.
        logits : Tensor, shape (tokens, experts)
            What its router was given.
        weights, ids : Tensor of float32 and int32, shape (tokens, top_k)
            What the router chose.

        Returns
        -------
        weights, ids : Tensor
            What is to be computed; the very tensors given when nothing is replaced.

        Raises
        ------
        RouterScoresError
            The router's scores are not numbers; the step has no output, as in :meth:`run`.
        """
        if self.virtual is None or self.failure is not None:
            return weights, ids
        if stage.position == 0 or not self._step_open:
            self._begin(len(ids))
        if self._everything is not None:
            return weights, ids
        routes = ids.numpy().astype(np.int64)
        self._note_wishes(stage, routes)  # they decide who stays, whoever stands in
        self._wished = routes, weights
        if not self._substituting:
            return weights, ids
        try:
            return self._stand_in(stage, logits, weights, ids, routes)
        except RouterScoresError as error:
            self._end(failed=True)
            if not self.facts.in_step:
                raise
            logger.error("%s", error)
            self.failure = error
            return weights, ids

    def _stand_in(
        self,
        stage: ExpertStage,
        logits: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        routes: NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.virtual is not None
        resident = self.manager.resident(stage.layer, arriving=not self.virtual.hard)
        exact = self._exact
        return stand_in(self.virtual, stage.layer, resident, stage.scoring, logits, weights, ids, routes, exact)

    def run(self, stage: ExpertStage, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute a layer's experts with stock's kernel, after bringing in those that are absent.

        Parameters
        ----------
        stage : ExpertStage
            The layer.
        x : Tensor, shape (tokens, hidden)
            Hidden states.
        weights, ids : Tensor of float32 and int32, shape (tokens, top_k)
            What the router chose.

        Raises
        ------
        ExpertLoadError
            An expert could not be read; the step has no output. With other workers in step it is zeros that nobody may
            use, and :attr:`failure` is set. Not NaN: it would stay in the KV cache, where attention multiplies what it
            masks by zero.
        """
        if self.failure is not None:
            return torch.zeros_like(x)
        try:
            # With virtual experts the choice before this has begun the step.
            if (stage.position == 0 and self.virtual is None) or not self._step_open:
                self._begin(len(ids))
            if self._everything is not None:
                numbers = ids if self._slots is None else self._slots.renumbered(stage.layer, ids)
                output = stage.module.compute_resident(x, weights, numbers)
            else:
                output = self._run_absent(stage, x, weights, ids)
        except ExpertLoadError as error:
            self._end(failed=True)
            if not self.facts.in_step:
                raise
            logger.error("%s", error)
            self.failure = error
            return torch.zeros_like(x)
        except BaseException:
            self._end(failed=True)
            raise
        if stage.position == self._last:
            self._end()
        return output

    def _run_absent(
        self, stage: ExpertStage, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        routes = ids.cpu().numpy().astype(np.int64)
        wanted = self._kind.tokens
        if wanted is not None and wanted < len(routes):  # padding must not load anything; nobody reads what it gives
            routes[wanted:] = routes[0]
            ids = torch.cat((ids[:wanted], ids[:1].expand(len(ids) - wanted, -1)))
        if self.virtual is None:
            self._note_wishes(stage, routes[:wanted])
        elif self._swapper is not None and self._kind.real and self._wished is not None:
            wished, gate = self._wished
            self._swapper.note(stage.layer, wished, gate.numpy(), x.float().numpy())
        if self._recording is not None and self._kind.real:
            self._recording.layer(stage.layer, routes, weights, x)
        capacity = self._capacity(stage.layer)
        if routes.size > capacity and len(np.unique(routes)) > capacity:
            return self._run_groups(stage, x, weights, ids, routes, capacity)
        output: torch.Tensor
        if self._slots is not None:
            with self._slots.working_set(stage.layer, routes, ids) as slots:
                self._load_ahead(stage, x[:wanted], routes[:wanted])
                output = stage.module.compute_resident(x, weights, slots)
            return output
        with self.manager.acquire(stage.layer, routes, wait=False) as lease:
            self._load_ahead(stage, x, routes)
            if self._substituting and (late := ~self.manager.resident(stage.layer)[routes]).any():
                compute = stage.module.compute_resident
                return compute_in_halves(compute, x, weights, ids, late, self._exact, lease.wait)
            lease.wait()
            output = stage.module.compute_resident(x, weights, ids)
        return output

    def _insisted(self, layer: int, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        assert self.virtual is not None
        stage, resident = self._by_layer[layer], self.manager.resident(layer, arriving=True)
        return insisted(self.virtual, resident, stage.scoring, logits, stage.top_k, self._exact)

    def _capacity(self, layer: int) -> int:
        """Experts of a layer that can be resident at once."""
        if self._slots is not None:
            return self._slots.capacity(layer)
        return self.manager.capacity(layer)

    @property
    def _never_waits(self) -> bool:
        """Whether the step chooses among resident experts only."""
        return self._substituting and self._swapper is not None

    def _load_ahead(self, stage: ExpertStage, x: torch.Tensor, routes: NDArray[np.int64]) -> None:
        # A warm-up has nothing ahead of it, and while graphs are captured no other thread may use the device.
        if self._ahead is not None and (self._kind.real or self._slots is None) and not self._never_waits:
            insisted = self._insisted if self._substituting else None
            self._ahead.after_router(
                stage.layer, routes, lambda: x.float().cpu().numpy(), decode=self._kind.decode, insisted=insisted
            )

    def _note_wishes(self, stage: ExpertStage, routes: NDArray[np.int64]) -> None:
        """Tell what a layer's router chose."""
        if self._kind.real:
            self.manager.observe(stage.layer, routes)
            if self.route_log is not None:
                self.route_log.note(stage.position, routes)

    def _run_groups(
        self,
        stage: ExpertStage,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        routes: NDArray[np.int64],
        capacity: int,
    ) -> torch.Tensor:
        output = torch.empty_like(x)
        stage.tokens = len(x)
        try:
            for tokens, wanted in token_groups(routes, capacity, self.manager.resident(stage.layer)):
                rows = torch.from_numpy(tokens)
                if self._slots is not None:
                    with self._slots.working_set(stage.layer, wanted, ids[rows]) as slots:
                        output[rows] = stage.module.compute_resident(x[rows], weights[rows], slots)
                    continue
                with self.manager.acquire(stage.layer, wanted):
                    output[rows] = stage.module.compute_resident(x[rows], weights[rows], ids[rows])
        finally:
            stage.tokens = None
        return output

    def _begin(self, tokens: int) -> None:
        self._end()
        self._kind = self._step_kind()
        tokens = min(tokens, self._kind.tokens or tokens)
        phase: Phase = "decode" if self._kind.decode else "prefill"
        recorded = self._recording is not None and self._kind.real
        self._everything = None if recorded else self.manager.hold_all(tokens, phase)
        if self._everything is not None and self._slots is not None:
            self._slots.hold()
        if self._recording is not None and recorded:
            self._recording.begin(self._spans, tokens, phase)
        if self._everything is None:
            self.manager.begin_step(tokens, phase)
        self._step_open = True
        self._substituting = False
        if self.virtual is not None and self._kind.real:
            self._exact = self._kind.exact(tokens, prompts=not self.virtual.settings.prefill)
            spared = 0 if self._exact is None else int(self._exact.sum())
            self._substituting = self.virtual.begin_step(tokens, "decode", exact=spared)
            if self._swapper is not None:
                self._swapper.begin_step(tokens, phase)

    def _end(self, *, failed: bool = False) -> None:
        if self._step_open:
            self._step_open = False
            if self._recording is not None and self._kind.real:
                self._recording.end(failed=failed)
            if self._everything is not None:
                if self._slots is not None:
                    self._slots.used()
                self._everything.release()
                self._everything = None
            self.manager.end_step()
            if self.virtual is not None and self._kind.real:
                self.virtual.end_step()
                if self._swapper is not None and self._never_waits:
                    self._swapper.after_step()
