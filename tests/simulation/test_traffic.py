"""Simulated traffic: what it counts is what the plain replay counts, nobody is lost, and alike requests load less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from expertier.cli.app import app
from expertier.errors import TraceTooShortError, UnsupportedOptionError
from expertier.routing.recorder import TraceRecorder
from expertier.routing.trace import read_trace
from expertier.scheduling import Admission, Fairness, PathBook, Worth, make_batcher
from expertier.simulation import load_events, replay
from expertier.simulation.requests import RecordedRequest, Texts, Traffic, cut_requests, poisson
from expertier.simulation.scheduling import ARMS, TrafficPlan, TrafficSimulator, check_arms
from expertier.simulation.timing import Timing
from expertier.simulation.traffic import Served, serve
from support.traces import header, skewed_routes, write_trace

SHAPE = header(4, 16, 2)
TIMING = Timing(bandwidth=4096 * 1000.0, compute=0.01)
HALF = 4 * 16 * 4096 // 2


def texts(count: int = 32, kinds: int = 4, length: int = 60) -> Texts:
    """Texts whose kind decides about tokens and, mostly, about experts."""
    random = np.random.default_rng(5)
    liking = random.dirichlet(np.full(16, 0.15), (kinds, 4)) + 2e-3
    tokens, routes = [], []
    for index in range(count):
        kind = index % kinds
        tokens.append(random.integers(20 * kind, 20 * kind + 20, length))
        noise = np.log(liking[kind]) + random.gumbel(size=(length, 4, 16))
        routes.append(np.argsort(-noise, axis=-1)[..., :2].astype(np.int64))
    return Texts(tokens=tokens, routes=routes, domains=[f"kind {index % kinds}" for index in range(count)])


def served(requests: list[RecordedRequest], batch: int, budget: int = HALF, **traffic: Any) -> Served:
    return serve(
        Traffic(requests=requests, **({"clients": len(requests)} | traffic)),
        SHAPE.layers,
        lambda clock: Admission(clock=clock),
        batch=batch,
        budget=budget,
        timing=TIMING,
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_one_request_after_the_other_loads_what_a_replay_of_the_trace_loads(tmp_path: Path, share: float) -> None:
    routes = skewed_routes(SHAPE, 90)
    events = load_events(write_trace(tmp_path / "trace", SHAPE, routes))
    parts = [routes[start : start + 30] for start in (0, 30, 60)]
    requests = [RecordedRequest(prompt=1, tokens=np.arange(30), routes=part) for part in parts]
    budget = int(share * SHAPE.total_bytes)
    found = served(requests, 1, budget)
    assert found.loads == int(replay(events, "lfu", budget).misses.sum())
    assert found.bytes_read == 4096 * found.loads
    assert found.output_tokens == 90 and found.steps == 90
    assert found.seconds - found.stalled == pytest.approx(found.steps * TIMING.compute)


def test_a_batch_of_all_is_one_decode_step_per_token() -> None:
    requests = cut_requests(texts(), 8, domains=None, prompt=(1, 1), output=(20, 20), seed=0)
    found = served(requests, 8)
    assert (found.steps, found.decode_tokens) == (20, 19 * 8)  # prompts are the first step


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_serves_every_request_to_its_end(arm: str) -> None:
    plan = TrafficPlan(requests=24, clients=24, prompt=(8, 16), output=(10, 30), batch=4, budget=HALF, step_tokens=20)
    source = texts()
    (run,) = TrafficSimulator(SHAPE, source, TIMING, 0.001).run(plan, [arm], seed=1)
    requests = cut_requests(source, 24, domains=None, prompt=(8, 16), output=(10, 30), seed=1)
    served_tokens = run.bytes_per_token / run.loads_per_token  # bytes of a load: nothing was counted twice
    assert served_tokens == pytest.approx(4096)
    assert sum(request.output for request in requests) > 24 * 9
    assert 0 < run.first_token_p99 < run.answer_p99


@pytest.mark.parametrize("arm", ["greedy", "similarity", "domains"])
def test_requests_of_a_kind_together_load_less_than_mixed(arm: str) -> None:
    plan = TrafficPlan(requests=32, clients=32, prompt=(12, 16), output=(30, 40), batch=4, budget=HALF // 2)
    simulator = TrafficSimulator(SHAPE, texts(64), TIMING, 0.0)
    runs = [simulator.run(plan, ["fcfs", arm], seed) for seed in range(3)]
    mixed, grouped = (sum(run[place].loads_per_token for run in runs) for place in (0, 1))
    assert grouped < 0.93 * mixed


def test_prompts_that_are_computed_together_load_less() -> None:
    requests = cut_requests(texts(64), 48, domains=None, prompt=(12, 16), output=(20, 40), seed=0)
    found = []
    for held in (0, 64):
        book = PathBook(4, 16)
        admission = Admission(make_batcher("similarity"), book, fairness=Fairness(held=held), worth=Worth("on"))
        found.append(
            serve(
                Traffic(requests=requests, clients=48),
                SHAPE.layers,
                lambda clock, admission=admission: admission,
                batch=8,
                budget=HALF // 2,
                timing=TIMING,
            )
        )
        assert (admission.stats.held > 0) == (held > 0)
    at_once, together = found
    assert together.requests == at_once.requests == 48
    assert together.steps - together.decode_steps < at_once.steps - at_once.decode_steps
    assert together.loads < at_once.loads


def test_with_room_for_everybody_the_arms_are_equal() -> None:
    plan = TrafficPlan(requests=6, clients=6, prompt=(8, 16), output=(10, 30), batch=8, budget=HALF)
    control, greedy = TrafficSimulator(SHAPE, texts(), TIMING, 0.0).run(plan, ["fcfs", "greedy"], seed=2)
    assert greedy.loads_per_token == control.loads_per_token
    assert greedy.first_token_p99 == control.first_token_p99
    assert greedy.answer_mean == control.answer_mean


def test_an_open_loop_waits_for_arrivals() -> None:
    requests = cut_requests(texts(), 12, domains=None, prompt=(4, 8), output=(5, 9), seed=3)
    rare = poisson(requests, 0.01, seed=3)
    found = served(requests, 4, seconds=rare.seconds)
    assert found.seconds > rare.seconds[-1]
    assert (found.first_token < 20).all() and (found.first_token > 0).all()
    assert (found.answered > found.first_token).all() and (found.answered < found.seconds).all()


def test_arrivals_come_at_the_asked_rate() -> None:
    requests = cut_requests(texts(), 400, domains=None, prompt=(4, 8), output=(5, 9), seed=3)
    assert poisson(requests, 5.0, seed=0).seconds[-1] == pytest.approx(80, rel=0.15)


def test_requests_are_cut_from_as_many_domains_as_asked_and_differ_by_seed() -> None:
    source = texts()
    first = cut_requests(source, 12, domains=3, prompt=(4, 8), output=(5, 9), seed=0)
    assert len({request.domain for request in first}) == 3
    assert all(4 <= request.prompt <= 8 and 5 <= request.output <= 9 for request in first)
    again, other = (cut_requests(source, 12, domains=3, prompt=(4, 8), output=(5, 9), seed=seed) for seed in (0, 1))
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
    assert any(len(a.tokens) != len(b.tokens) for a, b in zip(first, other, strict=True))


def test_what_the_trace_does_not_have_is_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="4 domains"):
        cut_requests(texts(), 12, domains=5, prompt=(4, 8), output=(5, 9), seed=0)
    with pytest.raises(TraceTooShortError, match="--tokens-per-text"):
        cut_requests(texts(length=9), 12, domains=None, prompt=(4, 8), output=(5, 9), seed=0)
    with pytest.raises(UnsupportedOptionError, match="scheduling arm 'best'"):
        check_arms(["best"])


# ---- as a command


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.trace"
    source = texts()
    with TraceRecorder(path, header(4, 16, 2, tokens=True)) as recorder:
        for number, (tokens, routes) in enumerate(zip(source.tokens, source.routes, strict=True)):
            for position, (token, row) in enumerate(zip(tokens.tolist(), routes, strict=True)):
                recorder.begin_step("decode", requests=[number], positions=[position], token_ids=[token])
                for layer in range(4):
                    recorder.record(layer, row[None, layer])
                recorder.end_step()
        recorder.note({"domains": source.domains})
    return path


SMALL = ("--requests", 12, "--prompt", "8:16", "--output", "10:20", "--repeats", 2)
SPEEDS = ("--bandwidth", "4MB/s", "--compute-ms", 10)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["traffic", *map(str, arguments)])


def test_the_command_writes_a_record_and_a_picture(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        trace, *SMALL, *SPEEDS, "--batch", 2, "--batch", 4, "--arm", "greedy", "--arm", "domains", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert (out / "traffic.png").stat().st_size > 10_000
    record = json.loads((out / "traffic.json").read_text())
    assert [(found["batch"], found["seed"], found["arm"]) for found in record["runs"]] == [
        (batch, seed, arm) for batch in (2, 4) for seed in (0, 1) for arm in ("fcfs", "greedy", "domains")
    ]
    assert "fcfs" in result.output and "TTFT" in result.output


def test_a_load_makes_arrivals_poisson(trace: Path, tmp_path: Path) -> None:
    result = run(trace, *SMALL, *SPEEDS, "--arm", "greedy", "--load", "70%", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "70 % load" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*SPEEDS, "--prompt", "many"), "--prompt many"),
        ((*SPEEDS, "--output", "9:3"), "--output 9:3"),
        ((*SPEEDS, "--load", "full"), "--load full"),
        ((*SPEEDS, "--arm", "best"), "no scheduling arm"),
        ((*SPEEDS, "--budget", "auto"), "budget in figures"),
        ((*SPEEDS, "--domains", 9, "--prompt", "4", "--output", "5"), "4 domains"),
        (("--prompt", "4"), "--bandwidth"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    trace: Path, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    result = run(trace, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_trace_without_domains_is_served_as_one(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace", SHAPE, skewed_routes(SHAPE, 60))
    source = Texts.of_trace(read_trace(tmp_path / "trace"))
    assert source.domains == [""]
    assert len(cut_requests(source, 3, domains=None, prompt=(4, 8), output=(5, 9), seed=0)) == 3
