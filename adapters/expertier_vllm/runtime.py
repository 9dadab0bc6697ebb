"""One model in one worker process: its expert layers, their memory, and what others see of them."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.budget import format_bytes
from expertier.catalog.routers import read_routers
from expertier.errors import UnsupportedOptionError
from expertier.manager import OffloadManager
from expertier.quality.serving import describe_losses, read_quality_budget, words_of_losses
from expertier.residency.windows import WindowPool
from expertier.routing import AheadLoader, GainGate, Lookahead, ProfileKeeper, RoutePredictor, TraceRecorder
from expertier.routing.opening import gate_mode, open_predictor, policy_for
from expertier.routing.trace_header import trace_header
from expertier.virtual import VirtualExperts, VirtualSettings
from expertier.virtual.importance import Importance
from expertier.virtual.swapping import Swapper
from expertier_vllm.forward import ForwardPass
from expertier_vllm.layers import LoadedExperts, LoadingLayers, WorkerFacts
from expertier_vllm.options import VllmOptions
from expertier_vllm.places import ExpertPlaces
from expertier_vllm.recording import StepRecording
from expertier_vllm.route_log import RouteLog
from expertier_vllm.slots import ExpertSlots
from expertier_vllm.step_kind import StepKind
from expertier_vllm.windows import ExpertWindows
from expertier_vllm.worker_budget import WorkerBudget


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
    facts : WorkerFacts
        As given.
    layers : LoadingLayers
        The layers while they load.
    places : ExpertPlaces
        Where the experts are; exists once the last layer has been loaded.
    forward : ForwardPass
        What happens when a layer computes; exists with the places.
    virtual : VirtualExperts or None
        Stand-ins for absent experts, where they were asked for.

    Notes
    -----
    Life: the layers load, and the last one makes places and forward pass; :meth:`finish_loading` checks that nothing
    was missed; :meth:`serve` when the KV cache has its memory.
    """

    places: ExpertPlaces
    forward: ForwardPass

    def __init__(self, options: VllmOptions, facts: WorkerFacts, step_kind: Callable[[], StepKind]) -> None:
        self.facts = facts
        self.virtual: VirtualExperts | None = None
        in_slots = options.host_budget is not None or facts.device != "cpu"
        self.layers = LoadingLayers(facts, options.offload, in_slots=in_slots, complete=self._make_places)
        self._offload, self._quality = read_quality_budget(options.offload, self.layers.catalog)
        self._host_budget = options.host_budget
        self._step_kind = step_kind
        self._routers = functools.cache(functools.partial(read_routers, self.layers.catalog))
        self._serving = False

    @property
    def manager(self) -> OffloadManager:
        """Decides which experts are there; exists with the places."""
        return self.places.manager

    @property
    def budget(self) -> WorkerBudget:
        """What the experts may hold; exists with the places."""
        return self.places.budget

    # ---- when the last layer has been loaded

    def _make_places(self, found: LoadedExperts) -> None:
        offload, sharers = self._offload, self.facts.local_workers
        self._stages, self._pack = found.stages, found.pack
        self._predictor = self._open_predictor()
        settings = VirtualSettings.from_options(offload, top_k=min(stage.top_k for stage in found.stages))
        if settings is not None:
            self.virtual = VirtualExperts([stage.layer for stage in found.stages], settings)
        policy = policy_for(offload, self._predictor, lossy=settings is not None)
        hard = self.virtual is not None and self.virtual.hard
        pool: WindowPool | None = None
        if self.layers.in_slots:  # what is not known to work with them was refused with the options
            self.places = ExpertSlots(found, offload, host_budget=self._host_budget, policy=policy, sharers=sharers)
        else:
            windows = ExpertWindows(found, offload, policy=policy, hard=hard, sharers=sharers)
            self.places, pool = windows, windows.pool
        weakref.finalize(self, self.manager.close)
        profile = offload.profile if self.facts.rank == 0 and self.layers.whole else "off"
        self._keeper = ProfileKeeper(profile, self.layers.catalog, self.layers.directories, self.manager)
        experts = {layer.layer: layer.experts for layer in found.layers}
        self.forward = ForwardPass(
            found.stages,
            self.places,
            self._step_kind,
            in_step=self.facts.in_step,
            virtual=self.virtual,
            swapper=Swapper(self.manager, Importance(experts)) if hard else None,
        )
        for stage in found.stages:
            stage.forward = self.forward
        if pool is not None and offload.trace is not None and self.facts.rank == 0:
            self.forward.recording = self._record(pool, offload.trace)

    def _open_predictor(self) -> RoutePredictor | None:
        asked = self._offload.predictor
        if self.layers.whole:
            return open_predictor(asked, self.layers.catalog, self.layers.directories, self._routers)
        if asked not in ("auto", "off"):
            raise UnsupportedOptionError(
                "A predictor of routes needs all layers in one worker.", "Use tensor instead of pipeline parallelism."
            )
        return None

    def _record(self, pool: WindowPool, path: str) -> StepRecording:
        offload = self._offload
        if not self.layers.whole:
            raise UnsupportedOptionError(
                "A trace needs all layers in one worker.", "Record with tensor instead of pipeline parallelism."
            )
        header = trace_header(
            self.layers.catalog,
            engine="vllm",
            pool=pool,
            weights=True,
            tokens=offload.trace_tokens == "on",
            hidden_size=int(self._stages[0].module.hidden_size) if offload.trace_hidden else 0,
            routers=self._routers(),
        )
        recorder = TraceRecorder(path, header)
        weakref.finalize(self, recorder.close)
        return StepRecording(recorder, hidden_every=offload.trace_hidden)

    # ---- when the model is complete

    def finish_loading(self, norms: Mapping[int, NDArray[np.float32]]) -> None:
        """Prepare for serving when the model is complete.

        Parameters
        ----------
        norms : mapping of int to ndarray of float32, shape (hidden,)
            Weights of the norm before the router, by layer.
        """
        self.layers.check()
        offload = self._offload
        if self.virtual is not None and self._quality is not None:
            definite = not self.budget.automatic
            self._quality.attach(self.virtual, lambda: self.manager.budget, self.budget.largest, definite=definite)
        lookahead = self._make_lookahead(norms) if offload.lookahead != "off" else None
        self._routers.cache_clear()
        self.forward.ahead = AheadLoader(
            manager=self.manager,
            experts={stage.layer: stage.experts for stage in self._stages},
            lookahead=lookahead,
            gate=GainGate(gate_mode(offload.lookahead, self._predictor)),
            predictor=self._predictor,
            listener=self.manager.forecast if self.manager.config.policy == "predictive" else None,
        )
        self._keeper.follow(self.forward.ahead)

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
        self.forward.route_log = RouteLog(
            self.manager,
            [stage.layer for stage in stages],
            [stage.experts for stage in stages],
            max(stage.top_k for stage in stages),
        )

    def serve(self, promised: int, meet: Callable[[], None]) -> None:
        """Take the final budget (:meth:`WorkerBudget.settle`) and say what runs."""
        self.budget.settle(promised, meet)
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
            **self.places.stats(),
        }

    def _mode_line(self) -> str:
        stats, ahead = self.manager.stats(), self.forward.ahead
        budget, total = stats.budget_bytes + self.budget.always, stats.total_bytes + self.budget.always
        return (
            f"expertier: {self.layers.catalog.architecture}, {self.facts.shard}, {stats.total_experts} experts of "
            f"{format_bytes(self.places.largest)} ({self._stages[0].format}), "
            f"budget {format_bytes(budget)} of {format_bytes(total)} ({100 * budget / total:.0f} %), "
            f"policy {self.manager.config.policy}, prediction by {ahead.words() if ahead else 'nothing'}, "
            f"{self.places.words()}sidecar {self._pack.path}, {words_of_losses(self.virtual, self._quality)}"
        )

    def note(self, values: Mapping[str, Any]) -> None:
        """Leave measurements in the trace."""
        if self.forward.recording is not None:
            self.forward.recording.recorder.note(values)

    def end_trace(self) -> None:
        """Complete the trace; nothing is recorded from then on."""
        recording, self.forward.recording = self.forward.recording, None
        if recording is not None:
            recording.recorder.close()

    def close(self) -> None:
        """Stop I/O and give all memory back; no layer may compute any more."""
        if not hasattr(self, "forward"):
            return
        self.budget.close()
        self._keeper.close()
        self.end_trace()
        self.manager.close()
