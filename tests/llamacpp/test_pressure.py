"""The budget changes while requests run: by hand, over HTTP, and by the governor under a real memory limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from expertier.errors import BudgetError
from expertier_llamacpp.governor import BudgetGovernor, StepMemory
from llamacpp.engines import PROMPT, closing, expertier, settings, sizes, stock_twin
from support.tiny_gguf import TinySpec, write_tiny

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20
SPEC = TinySpec(layers=4, experts=16, top_k=2, skew=0.7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("pressure") / "m.gguf", SPEC)


def answers(llama: Any, rounds: int) -> list[list[int]]:
    found = []
    for number in range(rounds):
        llama.reset()
        tokens: list[int] = []
        for token in llama.generate(PROMPT[number : number + 20], temp=0.0):
            tokens.append(token)
            if len(tokens) == 24:
                break
        found.append(tokens)
    return found


def test_tokens_are_stocks_while_the_budget_goes_down_and_up(model: Path) -> None:
    total = sizes(model).total
    with closing(stock_twin(model), expertier(model, "50%")) as (stock, ours):
        expected = answers(stock, 6)
        done = threading.Event()
        settled: list[float] = []

        def turn() -> None:
            while not done.is_set():
                for budget in ("25%", "50%"):
                    begin = time.monotonic()
                    assert ours.resize(budget) <= int(total * float(budget[:-1]) / 100)
                    settled.append(time.monotonic() - begin)

        turning = threading.Thread(target=turn)
        turning.start()
        try:
            found = answers(ours, 6)
        finally:
            done.set()
            turning.join()
        assert found == expected
        assert len(settled) > 4
        stats = ours.offload.stats()
        assert stats.peak_resident_bytes <= total // 2
        with pytest.raises(BudgetError, match="one token needs"):
            ours.resize(1)
        with pytest.raises(BudgetError, match="cannot be turned on later"):
            ours.resize("auto")


def test_budget_auto_can_be_capped_and_freed_again(model: Path) -> None:
    with closing(expertier(model, "auto", expert_governor="on")) as ours:
        before = ours.offload.budget
        assert ours.resize("50%") == sizes(model).total // 2
        answers(ours, 1)
        assert ours.offload.budget == sizes(model).total // 2
        assert ours.resize("auto") == before


def test_a_step_that_begins_while_the_budget_is_capped_does_not_undo_it() -> None:
    class Manager:
        budget = 1000
        meanwhile: threading.Thread | None = None

        def stats(self) -> SimpleNamespace:
            return SimpleNamespace(resident_bytes=0)

        def resize(self, budget: int) -> None:
            self.budget = budget
            if self.meanwhile is None:
                self.meanwhile = threading.Thread(target=governor.before, args=(100,))
                self.meanwhile.start()
                self.meanwhile.join(0.2)

    manager: Any = Manager()
    step = StepMemory(compute_per_token=1.0, work_per_token=0.0, n_ubatch=512)
    governor = BudgetGovernor(manager, step, margin=0, smallest=1, largest=1000)
    governor.cap(400)
    manager.meanwhile.join()
    assert manager.budget == 400


@pytest.mark.parametrize("enabled", [True, False])
def test_the_budget_changes_over_http_where_that_was_turned_on(model: Path, enabled: bool) -> None:
    from llama_cpp.server.settings import ServerSettings

    from expertier_llamacpp.server import OffloadModelSettings, create_app

    named = {key: value for key, value in settings().items() if key not in ("seed",)}
    named["expert_virtual_bias"] = 0.2
    served = OffloadModelSettings(model=str(model), expert_budget="50%", budget_endpoint=enabled, **named)
    with TestClient(create_app(ServerSettings(), [served])) as client:
        answer = client.post("/expertier/budget", json={"budget": "25%"})
        if not enabled:
            assert answer.status_code == 403
            assert "budget_endpoint" in answer.json()["error"]["remedy"]
            return
        assert answer.json()["budget_bytes"] == sizes(model).total // 4
        asked = {"prompt": "the quick", "max_tokens": 4, "temperature": 0}
        assert client.post("/v1/completions", json=asked).status_code == 200
        virtual = client.get("/expertier/stats").json()["virtual"]
        assert virtual["bias"] == 0.2
        assert virtual["tokens"] > 0
        assert len(virtual["substituted_share"]) == len(virtual["substituted_mass"]) == SPEC.layers
        metrics = client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'expertier_virtual_bias{rank="0"} 0.2' in metrics.text
        assert f'expertier_substituted_share{{layer="0",rank="0"}} {virtual["substituted_share"][0]}' in metrics.text
        assert "expertier_budget_bytes" in metrics.text and "expertier_quality" not in metrics.text
        refused = client.post("/expertier/budget", json={"budget": "1KiB"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "BudgetError")
        assert client.post("/expertier/budget", json={"budgit": 1}).status_code == 422


PRESSED = """
    import json, mmap, os, sys, time
    from pathlib import Path

    model, group, governor = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    (group / "cgroup.procs").write_text(str(os.getpid()))

    from expertier_llamacpp import Llama

    llm = Llama(str(model), n_ctx=256, n_batch=64, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False,
                expert_budget="80%", expert_governor=governor, expert_repack="off")
    taken, tokens, budgets = [], [], [llm.offload.budget]
    for number, token in enumerate(llm.generate(list(range(3, 40)), temp=0.0)):
        tokens.append(token)
        budgets.append(llm.offload.budget)
        if number >= 30 and len(taken) < 40:  # somebody else's memory, 4 MB at a time
            block = mmap.mmap(-1, 4 << 20)
            block.write(b"x" * (4 << 20))
            taken.append(block)
            time.sleep(0.12)
        if number == 90:
            break
    pressed = llm.offload.budget
    for block in taken:
        block.close()
    end = time.monotonic() + 40
    while llm.offload.budget <= pressed and time.monotonic() < end:
        time.sleep(0.1)
    print(json.dumps({"first": budgets[0], "pressed": pressed, "after": llm.offload.budget, "tokens": tokens}))
    llm.close()
"""


@pytest.fixture
def limited(memory_group: Callable[[int], Path]) -> Path:
    return memory_group(270 * MB)


@pytest.mark.root
@pytest.mark.slow
def test_the_governor_gives_memory_back_instead_of_being_killed_and_takes_it_again(
    limited: Path, tmp_path: Path
) -> None:
    big = write_tiny(tmp_path / "big.gguf", TinySpec(layers=4, experts=96, top_k=4, hidden=256, feed_forward=512))
    kept = _pressed(big, limited, "on")
    assert kept.returncode == 0, kept.stderr[-3000:]
    found = json.loads(kept.stdout.splitlines()[-1])
    assert found["pressed"] < found["first"], "the limit did not press"
    assert found["pressed"] < found["after"] <= found["first"]
    assert len(found["tokens"]) == 91
    assert "oom_kill 0" in (limited / "memory.oom_control").read_text()
    assert _pressed(big, limited, "off").returncode == -signal.SIGKILL, "there was no need to govern"
    big.unlink()


def _pressed(model: Path, group: Path, governor: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("plugin", "adapters", "tests"))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRESSED), str(model), str(group), governor],
        env={**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
