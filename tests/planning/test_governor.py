"""The governor: shrinks under pressure, grows in calm, and never swings."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.errors import BudgetError
from expertier.planning.governor import Decision, GovernorSettings, PressureGovernor, decide
from expertier.planning.memory import MemoryLimit
from expertier.planning.pressure import Pressure, read_pressure

SETTINGS = GovernorSettings(smallest=100, largest=10_000, reserve=500)


def pressure(left: int, some: float | None = None, full: float | None = None) -> Pressure:
    return Pressure(limit=MemoryLimit(source="machine", limit=20_000, left=left), some=some, full=full)


amounts = st.integers(min_value=0, max_value=20_000)
shares = st.none() | st.floats(min_value=0, max_value=1)


@given(st.integers(min_value=100, max_value=10_000), amounts, amounts, shares, shares, st.floats(0, 100))
def test_the_budget_stays_between_one_tokens_experts_and_what_was_asked_for(
    budget: int, left: int, held: int, some: float | None, full: float | None, now: float
) -> None:
    last = Decision(budget=budget, calm_since=0.0)
    found = decide(last, pressure(left, some, full), held=held, now=now, settings=SETTINGS)
    assert 100 <= found.budget <= 10_000
    if left < SETTINGS.reserve and min(budget, held) > 100:
        assert found.budget < budget
        assert found.budget == 100 or found.budget <= held - (SETTINGS.reserve - left)
    if found.budget > budget:
        assert now >= SETTINGS.calm_seconds
        assert left - (found.budget - min(held, budget)) >= 2 * SETTINGS.reserve


@given(st.integers(min_value=0, max_value=19_000), st.integers(min_value=0, max_value=19_000))
def test_with_others_memory_constant_it_comes_to_rest_with_the_reserve_free(before: int, after: int) -> None:
    """Others take `before`, later `after`; experts fill their budget at once."""
    last, now = Decision(budget=10_000, calm_since=0.0), 0.0
    for others in (before, after):
        budgets = []
        for _ in range(400):
            now += 0.25
            left = max(0, 20_000 - others - last.budget)
            last = decide(last, pressure(left), held=last.budget, now=now, settings=SETTINGS)
            budgets.append(last.budget)
        assert len(set(budgets[-20:])) == 1
        left = 20_000 - others - last.budget
        assert left >= SETTINGS.reserve or last.budget == SETTINGS.smallest
        directions = [b > a for a, b in itertools.pairwise(budgets) if a != b]
        assert sum(a != b for a, b in itertools.pairwise(directions)) <= 1, "it swings"


def test_tasks_that_wait_for_memory_count_only_while_little_is_left() -> None:
    last = Decision(budget=5_000, calm_since=0.0)
    for left, shrinks in ((1_500, True), (9_000, False)):
        found = decide(last, pressure(left, full=0.2), held=5_000, now=1.0, settings=SETTINGS)
        assert (found.budget < 5_000) is shrinks


def test_what_a_running_step_needs_is_asked_for_again() -> None:
    asked: list[int] = []

    def resize(budget: int) -> None:
        asked.append(budget)
        if len(asked) < 3:
            raise BudgetError("A step is running.")

    governor = PressureGovernor(SETTINGS, resize=resize, held=lambda: 10_000, read=lambda: pressure(100))
    for _ in range(3):
        governor.look(1.0)
    assert len(set(asked)) == 1 and governor.budget == asked[0] < 10_000


def test_the_thread_shrinks_grows_back_and_ends() -> None:
    left, budgets = [100], []
    grown = threading.Event()

    def resize(budget: int) -> None:
        budgets.append(budget)
        left[0] = 6_000
        if len(budgets) > 2:
            grown.set()

    settings = GovernorSettings(smallest=100, largest=10_000, reserve=500, calm_seconds=0.01)
    governor = PressureGovernor(
        settings, resize=resize, held=lambda: budgets[-1] if budgets else 10_000, read=lambda: pressure(left[0]),
        interval=0.005,
    )  # fmt: skip
    governor.start()
    assert grown.wait(10)
    governor.close()
    assert budgets[0] < 10_000 and budgets[1] > budgets[0]


def test_a_new_wish_is_what_it_grows_back_to() -> None:
    governor = PressureGovernor(SETTINGS, resize=lambda budget: None, held=lambda: 0, read=lambda: pressure(19_000))
    governor.ask(4_000)
    assert governor.budget == 4_000
    governor.look(100.0)
    assert governor.budget == 4_000


@pytest.mark.parametrize("own", [True, False])
def test_stall_information_of_the_own_group_wins_over_the_machines(tmp_path: Path, own: bool) -> None:
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1048576")
    (group / "memory.current").write_text("524288")
    (group / "memory.stat").write_text("inactive_file 0\nactive_file 4096\n")
    machine = tmp_path / "proc/pressure"
    machine.mkdir(parents=True)
    line = "avg10={} avg60=0.00 avg300=0.00 total=0"
    (machine / "memory").write_text(f"some {line.format('3.00')}\nfull {line.format('1.00')}\n")
    if own:
        (group / "memory.pressure").write_text(f"some {line.format('50.00')}\nfull {line.format('12.50')}\n")
    found = read_pressure(tmp_path, "0::/job")
    assert found.limit.left == 528384
    assert (found.some, found.full) == ((0.5, 0.125) if own else (0.03, 0.01))


def test_without_stall_information_there_is_none(tmp_path: Path) -> None:
    found = read_pressure(tmp_path, "")
    assert (found.some, found.full) == (None, None)
    assert found.limit.source == "machine"


def test_under_budget_auto_no_more_is_kept_free_than_half_of_its_margin() -> None:
    bounds = {"smallest": 1, "largest": 2, "limit": 8 << 30}
    assert GovernorSettings.usual(**bounds).reserve == (8 << 30) // 100
    assert GovernorSettings.usual(**bounds, margin=20 << 20).reserve == 10 << 20
    assert GovernorSettings.usual(**bounds, margin=1 << 30).reserve == (8 << 30) // 100
