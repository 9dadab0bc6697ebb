"""``expertier run``: text on stdout, everything about it on stderr."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from support.tiny_gguf import TinySpec

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engine

Invoke = Callable[..., Result]
TinyModel = Callable[[TinySpec], Path]
ROOTS = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in ("plugin", "adapters"))
COMMON = ("--max-tokens", 8, "--seed", 7, "--budget", "50%", "--threads", 1)


def test_text_goes_to_stdout_and_mode_and_summary_to_stderr(invoke: Invoke, tiny_model: TinyModel) -> None:
    result = invoke("run", tiny_model(TinySpec()), "-p", "once upon", *COMMON)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert "expertier" not in result.stdout
    mode, summary = [line for line in result.stderr.splitlines() if line.startswith("expertier:")]
    assert "lossless" in mode
    for field in ("tok/s", "hits", "/token", "stall", "first token after"):
        assert field in summary


def test_the_same_seed_gives_the_same_text_from_every_source_of_the_prompt(
    invoke: Invoke, invoke_json: Callable[..., Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(TinySpec())
    file = tmp_path / "prompt.txt"
    file.write_text("once upon")
    data = invoke_json("run", model, "-p", "once upon", *COMMON)
    assert data["prompt"] == "once upon"
    assert data["tokens"] >= 1 and data["ttft_seconds"] > 0
    assert data["stats"]["peak_resident_bytes"] <= data["stats"]["budget_bytes"]
    assert 0 <= data["hit_ratio"] <= 1
    for arguments, stdin in ((("-p", "once upon"), None), (("-f", file), None), ((), "once upon")):
        result = invoke("run", model, *arguments, *COMMON, stdin=stdin)
        assert result.stdout.removesuffix("\n") == data["text"]


def test_on_a_terminal_the_text_is_followed_by_a_live_line(tiny_model: TinyModel) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "expertier.cli", "run", str(tiny_model(TinySpec())), "-p", "once upon"]
    process = subprocess.Popen(
        [*command, *map(str, COMMON)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "PYTHONPATH": ROOTS, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(controller, 65536):
            shown += chunk
    os.close(controller)
    assert process.wait(timeout=60) == 0, shown.decode(errors="replace")
    text = shown.decode(errors="replace")
    assert "lossless" in text and "stall" in text
    assert "Traceback" not in text


def test_a_prompt_longer_than_the_context_is_refused(invoke: Invoke, tiny_model: TinyModel) -> None:
    result = invoke("run", tiny_model(TinySpec()), "-p", "word " * 200, "--n-ctx", 64, *COMMON)
    assert result.exit_code == 2
    assert "--n-ctx" in result.stderr
    assert "Traceback" not in result.output


def test_chat_without_a_template_is_refused(invoke: Invoke, tiny_model: TinyModel) -> None:
    result = invoke("run", tiny_model(TinySpec()), "-p", "hello", "--chat", *COMMON)
    assert result.exit_code == 2
    assert "--chat" in result.stderr


def test_a_prompt_step_that_cannot_fit_the_budget_is_refused_with_the_way_out(
    invoke: Invoke, tiny_model: TinyModel
) -> None:
    result = invoke("run", tiny_model(TinySpec(experts=16)), "-p", "many words " * 8, "--budget", "10%", "-n", 4)
    assert "Traceback" not in result.output
    assert result.exit_code == 0 or (result.exit_code == 2 and "n_ubatch" in result.stderr)
