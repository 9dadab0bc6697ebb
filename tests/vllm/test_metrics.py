"""What workers count: metrics, the board they are put on, the line in the log, and the routes, without an engine."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertier.telemetry import PhaseCounters, Stats

pytest.importorskip("prometheus_client")
pytest.importorskip("fastapi")

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from expertier.telemetry.metrics import Collector, expose, read_stats
from expertier_vllm import board as board_module
from expertier_vllm.board import Board, Reporter
from expertier_vllm.endpoint import EndpointPlugin
from expertier_vllm.metrics import log_line, report

STATS = Stats(
    budget_bytes=1000,
    resident_bytes=900,
    peak_resident_bytes=950,
    total_bytes=4000,
    resident_experts=9,
    total_experts=40,
    bytes_read=7000,
    prefetch_bytes_read=700,
    evictions=3,
    prefetches=5,
    prefetches_used=4,
    load_seconds=0.5,
    decode=PhaseCounters(steps=10, tokens=20, ready_hits=60, late=10, misses=30, stall_seconds=0.25),
    prefill=PhaseCounters(steps=1, tokens=400, ready_hits=1, misses=9, stall_seconds=2.0),
)


def record(rank: int = 0, **changes: Any) -> dict[str, Any]:
    return {**dataclasses.replace(STATS, **changes).as_dict(), "rank": rank, "mode": f"mode of {rank}"}


def test_an_infinite_bias_is_told_as_infinity() -> None:
    losses = {"bias": None, "tokens": 1, "exact_tokens": 0, "layers": (0,)}
    told = {**record(), "virtual": {**losses, "substituted_share": (0.5,), "substituted_mass": (0.25,)}}
    assert 'expertier_virtual_bias{rank="0"} +Inf' in expose([told]).decode()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Metrics by name, rank and, where they have one, phase."""
    return {
        (sample.name, *(sample.labels[label] for label in ("rank", "phase") if label in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---- metrics


def test_every_counter_of_every_worker_and_phase_is_exposed_under_a_conventional_name() -> None:
    text = expose([record(), record(1, bytes_read=1)]).decode()
    found = samples(text)
    assert found["expertier_budget_bytes", "0"] == 1000
    assert found["expertier_resident_bytes", "0"] == 900
    assert (found["expertier_bytes_read_total", "0"], found["expertier_bytes_read_total", "1"]) == (7000, 1)
    assert found["expertier_hits_total", "0", "decode"] == 70
    assert found["expertier_ready_hits_total", "0", "decode"] == 60
    assert found["expertier_misses_total", "1", "prefill"] == 9
    assert found["expertier_stall_seconds_total", "0", "prefill"] == 2.0
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "gauge")
        assert all(sample.name.endswith("_total") == (family.type == "counter") for sample in family.samples)


def test_what_stand_ins_cost_is_exposed_by_layer_where_they_are_on() -> None:
    virtual = {
        "bias": 0.1,
        "tokens": 40,
        "exact_tokens": 7,
        "layers": [1, 3],
        "substituted_share": [0.25, 0.5],
        "substituted_mass": [0.125, 0.0625],
    }
    quality = {"calibrated_bias": 0.3, "allowed": 0.01, "estimated": 0.004, "spent": 0.003, "back_offs": 2}
    lossy = {**record(1), "virtual": virtual, "quality": quality}
    text = expose([record(), lossy]).decode()
    found = samples(text)
    assert found["expertier_virtual_bias", "1"] == 0.1
    assert found["expertier_virtual_tokens_total", "1"] == 40
    assert found["expertier_virtual_exact_tokens_total", "1"] == 7
    assert found["expertier_quality_calibrated_bias", "1"] == 0.3
    assert found["expertier_quality_estimated", "1"] == 0.004
    assert found["expertier_quality_back_offs_total", "1"] == 2
    assert 'expertier_substituted_share{layer="3",rank="1"} 0.5' in text
    assert 'expertier_substituted_mass{layer="1",rank="1"} 0.125' in text
    assert ("expertier_virtual_bias", "0") not in found
    assert b"substituted" not in expose([record()])
    workers = report([record(), lossy])["workers"]
    assert workers[0]["virtual"] is None and workers[1]["virtual"] == virtual
    assert workers[0]["quality"] is None and workers[1]["quality"] == quality


def test_the_sum_over_workers_has_ratios_of_the_sums() -> None:
    other = record(1, decode=PhaseCounters(ready_hits=0, misses=100))
    answer = report([other, record()])
    assert [worker["rank"] for worker in answer["workers"]] == [0, 1]
    assert answer["workers"][1]["mode"] == "mode of 1"
    assert answer["sum"]["budget_bytes"] == 2000
    assert answer["sum"]["decode"]["hit_ratio"] == pytest.approx(0.35)
    assert answer["workers"][0]["decode"]["ready_hit_ratio"] == pytest.approx(0.6)
    assert "rank" not in answer["sum"]


def test_a_record_gives_the_counters_back() -> None:
    assert read_stats(record()) == STATS


def test_the_line_in_the_log_tells_what_happened_since_the_last_one() -> None:
    now = dataclasses.replace(
        STATS, bytes_read=7000 + (20 << 20), decode=dataclasses.replace(STATS.decode, ready_hits=150, misses=40)
    )
    line = log_line(2, STATS, now, 10.0)
    assert "worker 2" in line and "9 of 40 experts" in line and "2.00 MiB/s" in line
    assert "decode hits 90.0 % (ready 90.0 %)" in line and "prefill" not in line


# ---- the board


def test_a_scrape_reads_what_living_workers_have_written(tmp_path: Path) -> None:
    board = Board("abc", tmp_path)
    registry = CollectorRegistry()
    registry.register(Collector(board.read))
    assert generate_latest(registry) == b""
    board.write(record(1))
    board.write(record(0))
    board.write(record(0, budget_bytes=5))
    found = samples(generate_latest(registry).decode())
    assert (found["expertier_budget_bytes", "0"], found["expertier_budget_bytes", "1"]) == (5, 1000)
    assert board.directory.stat().st_mode & 0o077 == 0
    assert Board("xyz", tmp_path).read() == []
    board.remove(0)
    assert [entry["rank"] for entry in board.read()] == [1]
    board.clear()
    assert not board.directory.exists()
    board.remove(1)
    board.clear()


def write_and_die(root: Path, instance: str) -> None:
    script = (
        f"import sys; sys.path[:0] = {[str(path) for path in sys.path]!r}\n"
        "from pathlib import Path\nfrom expertier_vllm.board import Board\n"
        f"Board({instance!r}, Path({str(root)!r})).write({record()!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_a_killed_worker_has_left_is_not_shown_and_is_swept_away(tmp_path: Path) -> None:
    write_and_die(tmp_path, "dead")
    dead, alive = Board("dead", tmp_path), Board("alive", tmp_path)
    alive.write(record())
    assert dead.directory.exists() and dead.read() == []
    alive.sweep()
    assert dead.directory.exists()  # it may be one that is just starting
    long_ago = time.time() - 3600
    for board in (dead, alive):
        os.utime(board.directory, (long_ago, long_ago))
    Board("new", tmp_path).sweep()
    assert not dead.directory.exists() and len(alive.read()) == 1


def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    board = Board("abc", tmp_path)
    board.directory.mkdir()
    os.chown(board.directory, 12345, 12345)
    with pytest.raises(PermissionError):
        board.write(record())


def test_a_busy_worker_reports_and_an_idle_one_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(board_module, "_WRITE_SECONDS", 0.01)
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "0.03")
    caplog.set_level(logging.INFO, "vllm.expertier")
    now = record()
    board = Board("abc", tmp_path)
    reporter = Reporter(board, lambda: now)
    reporter.start()
    try:
        wait_for(lambda: bool(board.read()))
        written = (board.directory / "0.json").stat().st_mtime_ns
        time.sleep(0.2)
        assert (board.directory / "0.json").stat().st_mtime_ns == written
        assert not caplog.messages
        now = record(bytes_read=8000)
        wait_for(lambda: bool(caplog.messages) and board.read()[0]["bytes_read"] == 8000)
        assert "Expertier, worker 0" in caplog.messages[0]
    finally:
        reporter.close()
    assert not board.directory.exists()
    reporter.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- routes


class Engine:
    """Stands in for vLLM's client: answers calls like workers do."""

    def __init__(self, additional: dict[str, Any], answer: Callable[[str, tuple[Any, ...]], Any]) -> None:
        self.vllm_config = Namespace(additional_config=additional)
        self._answer = answer
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append((method, args))
        return [self._answer(method, args)]


def client(engine: Engine | None, key: list[str] | None = None) -> TestClient:
    import asyncio

    app, plugin = FastAPI(), EndpointPlugin()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, Namespace(api_key=key)))
    return TestClient(app, raise_server_exceptions=False)


ON = {"expertier": {"budget": "50%", "budget_endpoint": True}}


def answering(method: str, args: tuple[Any, ...]) -> Any:
    return record() if method == "expertier_stats" else {"budget_bytes": 1}


def error_of(answer: Any, status: int) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_routes_answer_with_the_workers_records() -> None:
    web = client(Engine(ON, answering))
    assert web.get("/expertier/stats").json() == report([record()])
    metrics = web.get("/expertier/metrics")
    assert metrics.headers["content-type"].startswith("text/plain") and metrics.content == expose([record()])


def test_the_budget_is_changed_only_where_that_was_turned_on() -> None:
    engine = Engine({"expertier": {"budget": "50%"}}, answering)
    error = error_of(client(engine).post("/expertier/budget", json={"budget": "1GiB"}), 403)
    assert "budget_endpoint" in error["remedy"] and engine.calls == []
    allowed = Engine(ON, answering)
    assert client(allowed).post("/expertier/budget", json={"budget": "1GiB"}).status_code == 200
    assert allowed.calls[0] == ("expertier_resize", ("1GiB",))


SENSELESS = [
    "", "x", "[]", "7", "{}", '{"budget": null}', '{"budget": "lots"}', '{"budget": -1}', '{"bugdet": 1}',
    '{"budget": "1GiB", "more": 1}', '"' + "x" * 10_000 + '"', "[" * 4000,
]  # fmt: skip


@pytest.mark.parametrize("body", SENSELESS)
def test_a_request_that_makes_no_sense_reaches_no_worker(body: str) -> None:
    engine = Engine(ON, answering)
    error = error_of(client(engine).post("/expertier/budget", content=body), 400)
    assert error["type"] in ("BudgetError", "UnsupportedOptionError") and error["message"]
    assert engine.calls == []


def test_a_workers_refusal_is_the_answer() -> None:
    refusal = {"error": {"type": "BudgetError", "problem": "Too small.", "remedy": "Give more."}}
    engine = Engine(ON, lambda method, args: refusal)
    error = error_of(client(engine).post("/expertier/budget", json={"budget": 1}), 400)
    assert error == {"type": "BudgetError", "message": "Too small.", "remedy": "Give more."}


def test_a_budget_that_one_worker_refuses_is_taken_back_from_all() -> None:
    refusal = {"error": {"type": "BudgetError", "problem": "Too small.", "remedy": "Give more."}}
    engine = Engine(ON, lambda method, args: refusal if method == "expertier_resize" else None)
    error_of(client(engine).post("/expertier/budget", json={"budget": "15%"}), 400)
    assert [method for method, _ in engine.calls] == ["expertier_resize", "expertier_undo_resize"]


def test_without_expertier_the_routes_say_how_to_turn_it_on() -> None:
    for engine in (Engine({}, answering), None):
        assert "--additional-config" in error_of(client(engine).get("/expertier/stats"), 404)["remedy"]


def test_an_engine_that_does_not_answer_is_an_error_that_can_be_parsed() -> None:
    def dead(method: str, args: tuple[Any, ...]) -> Any:
        raise RuntimeError("EngineCore died")

    assert "EngineCore died" in error_of(client(Engine(ON, dead)).get("/expertier/stats"), 500)["message"]


@pytest.mark.parametrize("path", ["/expertier/stats", "/expertier/metrics"])
def test_a_servers_key_guards_these_routes_as_well(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    web = client(Engine(ON, answering), ["one", "two"])
    assert error_of(web.get(path), 401)
    assert error_of(web.get(path, headers={"Authorization": "Bearer three"}), 401)
    assert error_of(web.get(path, headers={"Authorization": "Basic two"}), 401)
    assert web.get(path, headers={"Authorization": "Bearer two"}).status_code == 200
    monkeypatch.setenv("VLLM_API_KEY", "from the environment")
    assert error_of(client(Engine(ON, answering)).get(path), 401)
