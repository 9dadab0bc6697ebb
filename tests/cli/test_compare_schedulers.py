"""``expertier compare --scheduler``: requests that queue for a batch, in a real engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from support.tiny_gguf import TinySpec

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engine

FAST = ("--repeats", 2, "--batch", 2, "--prompt", "4:8", "--output", "2:6", "--threads", 1, "--budget", "50%")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve texts of three kinds."""
    texts = [{"domain": f"kind {kind}", "text": f"{kind}{number} " * 60} for kind in range(3) for number in range(4)]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts))
    return path


@pytest.mark.parametrize("turns", [(), ("--side-by-side",)], ids=["one engine", "side by side"])
def test_every_scheduler_serves_the_same_requests_to_their_end(
    invoke_json: Callable[..., Any],
    tiny_model: Callable[[TinySpec], Path],
    prompts: Path,
    tmp_path: Path,
    turns: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    data = invoke_json(
        "compare", tiny_model(TinySpec()), "--scheduler", "greedy", "--scheduler", "domains", "--prompts", prompts,
        "--requests", 9, "--lookahead", "off", "--out", out, *turns, *FAST,
    )  # fmt: skip
    runs = data["traffic"]["runs"]
    assert [(run["seed"], run["arm"]) for run in runs] == [
        (seed, arm) for seed in (0, 1) for arm in ("fcfs", "greedy", "domains")
    ]
    assert all(run["tokens_per_second"] > 0 and run["first_token_p99"] > 0 for run in runs)
    assert all(run["loads_per_token"] > 0 and run["bytes_per_token"] > 0 for run in runs)
    assert all(0 < run["answer_mean"] <= run["answer_p99"] for run in runs)
    assert all(0 < run["stalled"] < 1 for run in runs)
    assert all(run["processor_per_token"] > 0 for run in runs)
    assert data["traffic"]["plan"]["side_by_side"] is bool(turns)
    assert all(run["most_overtaken"] == 0 for run in runs if run["arm"] == "fcfs")
    assert data["traffic"]["timing"] is None
    assert json.loads((out / "traffic.json").read_text())["runs"] == runs
    assert (out / "traffic.png").read_bytes()[:4] == b"\x89PNG"


def test_a_recorded_log_is_served_at_its_own_times(
    invoke_json: Callable[..., Any], tiny_model: Callable[[TinySpec], Path], prompts: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"at": 0.01 * n, "prompt": f"Hello {n}", "tokens": 3}) for n in range(5)))
    data = invoke_json(
        "compare", tiny_model(TinySpec()), "--scheduler", "greedy", "--prompts", prompts, "--log", log,
        "--out", tmp_path / "out", *FAST,
    )  # fmt: skip
    assert {run["arm"] for run in data["traffic"]["runs"]} == {"fcfs", "greedy"}
    assert data["traffic"]["plan"]["requests"] == 5


def test_requests_may_come_at_a_part_of_what_first_come_first_served_can_do(
    invoke_json: Callable[..., Any], tiny_model: Callable[[TinySpec], Path], prompts: Path, tmp_path: Path
) -> None:
    data = invoke_json(
        "compare", tiny_model(TinySpec()), "--scheduler", "similarity", "--prompts", prompts, "--load", "20%",
        "--requests", 6, "--earlier", 4, "--side-by-side", "--out", tmp_path / "out", *FAST, "--repeats", 1,
    )  # fmt: skip
    assert data["traffic"]["plan"]["load"] == 0.2
    assert [run["arm"] for run in data["traffic"]["runs"]] == ["fcfs", "similarity"]
    assert all(0 < run["first_token_p99"] <= run["answer_p99"] for run in data["traffic"]["runs"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--scheduler", "best"), "There is no scheduling arm 'best'"),
        (("--scheduler", "greedy", "--limit", "50%"), "--scheduler cannot be combined with --limit"),
        (("--scheduler", "greedy", "--domains", "9"), "There are 3 domains"),
        (("--scheduler", "greedy", "--load", "x"), "--load x is not"),
        (("--batch", "4"), "--batch needs --scheduler"),
        (("--side-by-side",), "--side-by-side needs --scheduler"),
        (("--variant", "other:scheduler=greedy"), "Compare schedulers with --scheduler"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    invoke: Callable[..., Result],
    tiny_model: Callable[[TinySpec], Path],
    prompts: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    words: str,
) -> None:
    result = invoke("compare", tiny_model(TinySpec()), "--prompts", prompts, "--out", tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
