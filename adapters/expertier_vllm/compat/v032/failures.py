"""vLLM 0.32: all workers of a server learn that one of them lacks an expert, and why."""

from __future__ import annotations

from typing import Any, Final

import torch
from vllm.distributed import get_pp_group, get_tp_group

_MOST_BYTES: Final = 1024  # of a cause


class FailureExchange:
    """Carries the cause of a failed step to the worker whose output the scheduler gets.

    Workers of a tensor parallel group tell each other, and every stage of a pipeline tells the next one: its last stage
    answers for all. A stage does not wait for those behind it, so steps overlap as in stock.

    Upstream: ``GroupCoordinator.cpu_group``, ``prev_rank`` and ``next_rank``. What is sent here follows the tensors of
    ``Worker.execute_model`` on every worker, so messages meet in order.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[Any, torch.Tensor]] = []  # messages under way; memory that is sent must stay

    def settle(self, problem: str | None) -> str | None:
        """Exchange what went wrong in a step; to be called by all workers after each forward pass.

        Parameters
        ----------
        problem : str or None
            What this worker lacks.

        Returns
        -------
        str or None
            Why the step is worthless, as far as this worker knows; ``None`` if it is not.
        """
        stages = get_pp_group()
        if not stages.is_first_rank:
            problem = _receive(stages) or problem
        if get_tp_group().world_size > 1:
            problem = _agree(get_tp_group(), problem)
        if not stages.is_last_rank:
            self._send(stages, problem)
        return problem

    def _send(self, stages: Any, problem: str | None) -> None:
        for work, _ in self._sent:
            work.wait()
        text = _bytes(problem)
        messages = [torch.tensor([len(text)]), *([text] if len(text) else [])]
        self._sent = [
            (torch.distributed.isend(message, stages.next_rank, group=stages.cpu_group), message)
            for message in messages
        ]


def _receive(stages: Any) -> str | None:
    size = torch.zeros(1, dtype=torch.int64)
    torch.distributed.recv(size, stages.prev_rank, group=stages.cpu_group)
    if not int(size):
        return None
    text = torch.empty(int(size), dtype=torch.uint8)
    torch.distributed.recv(text, stages.prev_rank, group=stages.cpu_group)
    return bytes(text.numpy()).decode(errors="replace")


def _agree(workers: Any, problem: str | None) -> str | None:
    """Return the cause of the first worker that has one."""
    group = workers.cpu_group
    none = workers.world_size
    first = torch.tensor([none if problem is None else workers.rank_in_group])
    torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN, group=group)
    if int(first) == none:
        return None
    text = torch.zeros(_MOST_BYTES, dtype=torch.uint8)
    if int(first) == workers.rank_in_group:
        own = _bytes(problem)
        text[: len(own)] = own
    torch.distributed.broadcast(text, workers.ranks[int(first)], group=group)
    return bytes(text.numpy()).rstrip(b"\0").decode(errors="replace")


def _bytes(problem: str | None) -> torch.Tensor:
    return torch.tensor(list((problem or "").encode()[:_MOST_BYTES]), dtype=torch.uint8)
