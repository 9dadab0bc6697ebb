"""A forward pass: what happens when a layer computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.errors import ExpertLoadError, RouterScoresError
from expertier.manager import Lease, Phase
from expertier.routing import AheadLoader, Span
from expertier.virtual import VirtualExperts
from expertier.virtual.swapping import Swapper
from expertier_vllm.grouping import token_groups
from expertier_vllm.halves import compute_in_halves
from expertier_vllm.places import ExpertPlaces
from expertier_vllm.recording import StepRecording
from expertier_vllm.route_log import RouteLog
from expertier_vllm.stage import ExpertStage
from expertier_vllm.stand_ins import insisted, stand_in
from expertier_vllm.step_kind import StepKind

logger = logging.getLogger("expertier")


class ForwardPass:
    """The forward passes of one worker, one after the other; fulfils :class:`expertier_vllm.stage.Computation`.

    Parameters
    ----------
    stages : sequence of ExpertStage
        The layers, in order.
    places : ExpertPlaces
        Where their experts are.
    step_kind : callable
        Tells about the running pass.
    in_step : bool
        Whether other workers wait for this one.
    virtual : VirtualExperts, optional
        Stand-ins for absent experts.
    swapper : Swapper, optional
        Brings experts in where stand-ins never wait.

    Attributes
    ----------
    failure : ExpertLoadError or RouterScoresError or None
        With workers in step: why this one's part of the pass is worthless. Whoever runs passes resets it.
    ahead : AheadLoader or None
        Loads what later layers are likely to need.
    recording : StepRecording or None
        Writes routes into a trace.
    route_log : RouteLog or None
        Where the scheduler learns what requests use.
    step_kind : callable
        As given.
    """

    def __init__(
        self,
        stages: Sequence[ExpertStage],
        places: ExpertPlaces,
        step_kind: Callable[[], StepKind],
        *,
        in_step: bool,
        virtual: VirtualExperts | None = None,
        swapper: Swapper | None = None,
    ) -> None:
        self.failure: ExpertLoadError | RouterScoresError | None = None
        self.ahead: AheadLoader | None = None
        self.recording: StepRecording | None = None
        self.route_log: RouteLog | None = None
        self.step_kind = step_kind
        self._places = places
        self._manager = places.manager
        self._in_step = in_step
        self._virtual = virtual
        self._swapper = swapper
        self._by_layer = {stage.layer: stage for stage in stages}
        self._last = len(stages) - 1
        self._spans: Sequence[Span] = ()  # tokens of the pass that has been announced
        self._kind = StepKind(real=False, decode=False)
        self._open = False
        self._everything: Lease | None = None  # all experts are resident, and pinned for this step
        self._substituting = False
        self._exact: NDArray[np.bool_] | None = None  # tokens of the step that may not be given stand-ins
        # What the swapper is not told yet of a layer.
        self._wished: tuple[NDArray[np.int64], torch.Tensor] | None = None

    def announce(self, spans: Sequence[Span]) -> None:
        """Take note of the tokens that the next forward pass computes, and load ahead for it.

        Parameters
        ----------
        spans : sequence of Span
            One for each of its requests, in the order of the batch.
        """
        self._spans = spans
        if self.ahead is not None and self.ahead.follows_tokens:
            decode = all(span.tokens is not None and len(span.tokens) == 1 for span in spans)
            # What a prediction would load while stand-ins are allowed is mostly what they stand in for.
            lossy = self._virtual is not None and self._virtual.allowed("decode")
            self.ahead.begin(spans, decode=decode and not lossy and not self._manager.complete)

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
        if self._virtual is None or self.failure is not None:
            return weights, ids
        if stage.position == 0 or not self._open:
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
            self._give_up(error)
            return weights, ids

    def _stand_in(
        self,
        stage: ExpertStage,
        logits: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        routes: NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._virtual is not None
        resident = self._manager.resident(stage.layer, arriving=not self._virtual.hard)
        exact = self._exact
        return stand_in(self._virtual, stage.layer, resident, stage.scoring, logits, weights, ids, routes, exact)

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
            if (stage.position == 0 and self._virtual is None) or not self._open:
                self._begin(len(ids))
            if self._everything is not None:
                output = stage.module.compute_resident(x, weights, self._places.numbers(stage.layer, ids))
            else:
                output = self._run_absent(stage, x, weights, ids)
        except ExpertLoadError as error:
            self._give_up(error)
            return torch.zeros_like(x)
        except BaseException:
            self._end(failed=True)
            raise
        if stage.position == self._last:
            self._end()
        return output

    def _give_up(self, error: ExpertLoadError | RouterScoresError) -> None:
        """End a pass that has no output: raise why, or note it where other workers wait for what this one computes."""
        self._end(failed=True)
        if not self._in_step:
            raise error
        logger.error("%s", error)
        self.failure = error

    def _run_absent(
        self, stage: ExpertStage, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        routes = ids.cpu().numpy().astype(np.int64)
        wanted = self._kind.tokens
        if wanted is not None and wanted < len(routes):  # padding must not load anything; nobody reads what it gives
            routes[wanted:] = routes[0]
            ids = torch.cat((ids[:wanted], ids[:1].expand(len(ids) - wanted, -1)))
        if self._virtual is None:
            self._note_wishes(stage, routes[:wanted])
        elif self._swapper is not None and self._kind.real and self._wished is not None:
            wished, gate = self._wished
            self._swapper.note(stage.layer, wished, gate.numpy(), x.float().numpy())
        if self.recording is not None and self._kind.real:
            self.recording.layer(stage.layer, routes, weights, x)
        capacity = self._places.capacity(stage.layer)
        if routes.size > capacity and len(np.unique(routes)) > capacity:
            return self._run_groups(stage, x, weights, ids, routes, capacity)
        output: torch.Tensor
        with self._places.acquire(stage.layer, routes, ids) as held:
            self._load_ahead(stage, x, routes, wanted)
            if self._substituting and (late := ~self._manager.resident(stage.layer)[routes]).any():
                compute = stage.module.compute_resident
                return compute_in_halves(compute, x, weights, held.numbers, late, self._exact, held.wait)
            held.wait()
            output = stage.module.compute_resident(x, weights, held.numbers)
        return output

    def _insisted(self, layer: int, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        assert self._virtual is not None
        stage, resident = self._by_layer[layer], self._manager.resident(layer, arriving=True)
        return insisted(self._virtual, resident, stage.scoring, logits, stage.top_k, self._exact)

    @property
    def _never_waits(self) -> bool:
        """Whether the step chooses among resident experts only."""
        return self._substituting and self._swapper is not None

    def _load_ahead(self, stage: ExpertStage, x: torch.Tensor, routes: NDArray[np.int64], wanted: int | None) -> None:
        if self.ahead is not None and (self._kind.real or self._places.ahead_in_warm_ups) and not self._never_waits:
            insisted = self._insisted if self._substituting else None
            self.ahead.after_router(
                stage.layer,
                routes[:wanted],
                lambda: x[:wanted].float().cpu().numpy(),
                decode=self._kind.decode,
                insisted=insisted,
            )

    def _note_wishes(self, stage: ExpertStage, routes: NDArray[np.int64]) -> None:
        """Tell what a layer's router chose."""
        if self._kind.real:
            self._manager.observe(stage.layer, routes)
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
            for tokens, wanted in token_groups(routes, capacity, self._manager.resident(stage.layer)):
                rows = torch.from_numpy(tokens)
                with self._places.acquire(stage.layer, wanted, ids[rows]) as held:
                    held.wait()
                    output[rows] = stage.module.compute_resident(x[rows], weights[rows], held.numbers)
        finally:
            stage.tokens = None
        return output

    def _begin(self, tokens: int) -> None:
        self._end()
        self._kind = self.step_kind()
        tokens = min(tokens, self._kind.tokens or tokens)
        phase: Phase = "decode" if self._kind.decode else "prefill"
        recorded = self.recording is not None and self._kind.real
        self._everything = None if recorded else self._manager.hold_all(tokens, phase)
        if self._everything is not None:
            self._places.hold()
        if self.recording is not None and recorded:
            self.recording.begin(self._spans, tokens, phase)
        if self._everything is None:
            self._manager.begin_step(tokens, phase)
        self._open = True
        self._substituting = False
        if self._virtual is not None and self._kind.real:
            self._exact = self._kind.exact(tokens, prompts=not self._virtual.settings.prefill)
            spared = 0 if self._exact is None else int(self._exact.sum())
            self._substituting = self._virtual.begin_step(tokens, "decode", exact=spared)
            if self._swapper is not None:
                self._swapper.begin_step(tokens, phase)

    def _end(self, *, failed: bool = False) -> None:
        if self._open:
            self._open = False
            if self.recording is not None and self._kind.real:
                self.recording.end(failed=failed)
            if self._everything is not None:
                self._places.used()
                self._everything.release()
                self._everything = None
            self._manager.end_step()
            if self._virtual is not None and self._kind.real:
                self._virtual.end_step()
                if self._swapper is not None and self._never_waits:
                    self._swapper.after_step()
