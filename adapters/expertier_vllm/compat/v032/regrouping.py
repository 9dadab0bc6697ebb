"""vLLM 0.32: the scheduler that lets requests join which share experts. Imported only where it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy

from expertier.errors import UnsupportedOptionError
from expertier.scheduling import CONTROL, Admission, PathBook, make_batcher
from expertier_vllm.compat.v032.scheduler import ROUTES, ExpertierScheduler
from expertier_vllm.options import KEY, VllmOptions
from expertier_vllm.route_log import StepRoutes

logger = logging.getLogger("vllm.expertier")

_USUAL: Final = "similarity"


class PreferringQueue(RequestQueue):  # type: ignore[misc]
    """A queue of vLLM's in which some requests are preferred for one step; all others keep its order.

    Upstream: ``Scheduler.waiting``, from which ``schedule`` takes requests one by one until there is no room.
    """

    def __init__(self, stock: Any) -> None:
        self._stock = stock
        self._preferred: list[Any] = []
        self.closed = False
        """Whether nobody is taken from it for now: then it is as good as empty, and only its length tells."""

    def prefer(self, requests: list[Any]) -> None:
        """Let these go first, in this order; what was preferred before is forgotten."""
        self._preferred = requests

    def add_request(self, request: Any) -> None:
        self._stock.add_request(request)

    def peek_request(self) -> Any:
        return self._preferred[0] if self._preferred else self._stock.peek_request()

    def pop_request(self) -> Any:
        if not self._preferred:
            return self._stock.pop_request()
        request = self._preferred.pop(0)
        self._stock.remove_request(request)
        return request

    def prepend_request(self, request: Any) -> None:
        self._stock.prepend_request(request)

    def prepend_requests(self, requests: Any) -> None:
        self._stock.prepend_requests(requests)

    def remove_request(self, request: Any) -> None:
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Any]) -> None:
        gone = set(requests)
        self._preferred = [request for request in self._preferred if request not in gone]
        self._stock.remove_requests(gone)

    def __bool__(self) -> bool:
        return not self.closed and bool(self._stock)

    def __len__(self) -> int:
        return len(self._stock)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stock)


class RegroupingScheduler(ExpertierScheduler):
    """Lets those waiting requests join whose tokens share experts with the running ones and with what is resident.

    Everything else is vLLM's: what runs keeps running, prompts are computed in chunks, prefixes are shared, and who was
    preempted comes first. Requests are never held back for each other's sake: a larger batch loads less per token.
    Requests in vLLM's sense of priority are regrouped within their priority only.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        options = VllmOptions.from_additional_config(self.vllm_config.additional_config)
        if options is None:
            raise UnsupportedOptionError(
                "RegroupingScheduler knows nothing of experts without Expertier.",
                f"""Add --additional-config '{{"{KEY}": {{"budget": "50%"}}}}', or leave --scheduler-cls out.""",
            )
        self.admission = Admission(make_batcher(options.scheduler or _USUAL), fairness=options.fairness)
        self._resident: NDArray[np.float32] | None = None
        self._ranked = self.policy == SchedulingPolicy.PRIORITY
        self.waiting: PreferringQueue = PreferringQueue(self.waiting)

    @property
    def stock_order(self) -> bool:
        """Whether vLLM's own order stays."""
        return bool(self.admission.batcher.name == CONTROL)

    # ---- requests come and go

    def add_request(self, request: Any) -> None:
        new = request.request_id not in self.requests
        super().add_request(request)
        if new:
            prompt = request.prompt_token_ids or ()  # none if embeddings were given
            self.admission.arrive(request.request_id, prompt, priority=request.priority if self._ranked else 0)

    def _free_request(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        self.admission.leave(request.request_id)
        return super()._free_request(request, *arguments, **keywords)

    # ---- a step

    def schedule(self, *arguments: Any, **keywords: Any) -> Any:
        self._prefer()
        try:
            output = super().schedule(*arguments, **keywords)
        finally:
            self.waiting.prefer([])
            self.waiting.closed = False
        for new in output.scheduled_new_reqs:
            self.admission.joined(new.req_id)
        return output

    def _prefer(self) -> None:
        room = self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input
        if not self.admission.compares or room <= 0 or len(self.waiting) <= room:
            return
        known = set(self.admission.waiting())
        again = any(request.request_id not in known for request in self.waiting)
        if self.running and not again and self.admission.holds(room):
            self.waiting.closed = True
            return
        place = {request: index for index, request in enumerate(self.admission.propose(room, resident=self._resident))}
        # Whoever ran before and was preempted does not wait for admission: it goes first, as in stock.
        chosen = [
            ((request.priority if self._ranked else 0, place.get(request.request_id, -1)), request)
            for request in self.waiting
            if request.request_id in place or request.request_id not in known
        ]
        self.waiting.prefer([request for _, request in sorted(chosen, key=lambda item: item[0])])

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        told: StepRoutes | None = getattr(model_runner_output, ROUTES, None)
        counts = scheduler_output.num_scheduled_tokens
        if told is not None and not self.stock_order:
            try:
                self._learn(told, scheduler_output, model_runner_output.req_ids)
            except Exception as error:
                self.admission.give_up(error)
        if counts:
            decode = told is not None and max(counts.values()) == 1
            self.admission.step(len(counts) if decode else 0, told.loads if told is not None else 0)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _learn(self, told: StepRoutes, scheduler_output: Any, order: list[str]) -> None:
        """Give every row its request and token; upstream: rows are in the order of ``ModelRunnerOutput.req_ids``."""
        if self.admission.book is None:
            self.admission.book = PathBook(told.routes.shape[1], told.experts)
        counts = scheduler_output.num_scheduled_tokens
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        order = [name for name in order if counts.get(name)]
        ends = np.cumsum([counts[name] for name in order])
        owner = np.searchsorted(ends, told.rows, side="right")
        offset = told.rows - (ends - np.array([counts[name] for name in order]))[owner]
        tokens = np.full(len(told.rows), -1, np.int64)
        names = [order[index] for index in owner.tolist()]
        for row, (name, within) in enumerate(zip(names, offset.tolist(), strict=True)):
            request = self.requests.get(name)
            position = computed[name] + within
            if request is not None and position < len(request.all_token_ids):
                tokens[row] = request.all_token_ids[position]
        self.admission.observe(names, tokens, told.routes.astype(np.int64))
        if told.resident is not None:
            width = told.routes.shape[1] * told.experts
            self._resident = np.unpackbits(told.resident, count=width).astype(np.float32)
