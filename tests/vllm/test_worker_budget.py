"""What one worker's experts may hold, without an engine around them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from expertier.config import OffloadOptions
from expertier.errors import BudgetError
from expertier.planning.memory import MemoryLimit
from expertier_vllm import worker_budget
from expertier_vllm.worker_budget import WorkerBudget

MB = 1 << 20


def budget_of(*, on_host: bool) -> tuple[WorkerBudget, Any]:
    """A worker with 64 MiB of experts, half of them resident."""
    budget = WorkerBudget(OffloadOptions(budget="50%"), smallest=MB, largest=64 * MB, one_layer=8 * MB, on_host=on_host)
    manager: Any = SimpleNamespace(budget=budget.first, stats=lambda: SimpleNamespace(resident_bytes=0))
    budget.attach(manager, lambda amount: vars(manager).update(budget=amount))
    return budget, manager


def test_experts_on_a_device_cannot_take_what_the_kv_cache_has_left() -> None:
    budget, manager = budget_of(on_host=False)
    with pytest.raises(BudgetError, match="on a device"):
        budget.resize("auto")
    assert manager.budget == 32 * MB
    assert budget.resize("25%") == manager.budget == 16 * MB


def test_experts_on_the_host_take_what_is_left() -> None:
    budget, manager = budget_of(on_host=True)
    assert budget.resize("auto") == manager.budget
    assert MB <= manager.budget <= 64 * MB


class Machine:
    """100 MiB of memory and two workers that begin to serve at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = [0, 0]
        self.refused: list[int] = []
        monkeypatch.setattr(worker_budget, "memory_left", self.left)

    def left(self) -> MemoryLimit:
        return MemoryLimit(source="machine", limit=100 * MB, left=100 * MB - sum(self.taken))

    def serve(self, number: int, asked: int, meet: Callable[[], Any]) -> None:
        budget = WorkerBudget(OffloadOptions(budget=asked), smallest=MB, largest=64 * MB, one_layer=MB, sharers=2)
        manager: Any = SimpleNamespace(
            budget=budget.first,
            stats=lambda: SimpleNamespace(resident_bytes=self.taken[number]),
            warm_up=lambda: self.taken.__setitem__(number, asked),
            wait_until_filled=lambda: None,
        )
        budget.attach(manager, lambda amount: vars(manager).update(budget=amount))
        try:
            budget.settle(0, meet)
        except BudgetError:
            self.refused.append(number)

    def serve_both(self, *asked: int) -> None:
        meeting = threading.Barrier(2)
        workers = [
            threading.Thread(target=self.serve, args=(number, amount, lambda: meeting.wait(10)))
            for number, amount in enumerate(asked)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


def test_workers_look_at_what_is_left_before_any_of_them_fills_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.serve_both(40 * MB, 40 * MB)
    assert (machine.taken, machine.refused) == ([40 * MB, 40 * MB], [])
    machine.taken[1] = 0
    machine.serve(1, 40 * MB, lambda: None)
    assert machine.refused == [1], "what became of one that looked after the other had filled its part"


def test_nobody_waits_for_a_worker_whose_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.serve_both(60 * MB, 40 * MB)
    assert (machine.taken, machine.refused) == ([0, 40 * MB], [0])
