"""What one worker's experts may hold, without an engine around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from expertier.config import OffloadOptions
from expertier.errors import BudgetError
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
