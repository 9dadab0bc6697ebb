"""Refusals, interrupts and usage: one clear message, never a traceback, an exit code that tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from support.tiny_gguf import TinySpec

Invoke = Callable[..., Result]
TinyModel = Callable[[TinySpec], Path]
ROOTS = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in ("plugin", "adapters"))
COMMANDS = ("plan", "run", "compare")


def cut(model: Path, target: Path, size: int | None = None) -> Path:
    content = model.read_bytes()
    target.write_bytes(content[: size if size is not None else len(content) // 2])
    return target


@pytest.fixture
def broken(tiny_model: TinyModel, dense_model: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Models that cannot be run: path and what the message must name."""
    tiny = tiny_model(TinySpec())
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"not a model" * 100)
    empty = tmp_path / "empty.gguf"
    empty.touch()
    return {
        "missing": (tmp_path / "missing.gguf", "missing.gguf"),
        "directory": (tmp_path, str(tmp_path.name)),
        "dense": (dense_model, "dense model"),
        "truncated": (cut(tiny, tmp_path / "truncated.gguf"), "truncated"),
        "header only": (cut(tiny, tmp_path / "header.gguf", 100), "header.gguf"),
        "garbage": (garbage, "garbage.gguf"),
        "empty": (empty, "empty.gguf"),
    }


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "directory", "dense", "truncated", "header only", "garbage", "empty"])
def test_a_model_that_cannot_be_run_is_refused_in_one_line(
    invoke: Invoke, broken: dict[str, tuple[Path, str]], command: str, kind: str
) -> None:
    path, named = broken[kind]
    result = invoke(command, path, stdin="prompt")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("expertier: ") and named in line
    assert "Traceback" not in line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("budget", ["lots", "-5GiB", "0", "101%", "1PB", "12 parsecs", "", "nan", "1e400", "٣GiB"])
def test_a_budget_that_is_no_amount_is_refused_in_one_line(
    invoke: Invoke, tiny_model: TinyModel, command: str, budget: str
) -> None:
    result = invoke(command, tiny_model(TinySpec()), "--budget", budget, stdin="x")
    assert result.exit_code == 2, result.output
    [line] = result.stderr.strip().splitlines()
    assert "budget" in line and "Traceback" not in line


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_budget_below_one_token_is_refused_with_the_smallest_that_works(
    invoke: Invoke, tiny_model: TinyModel, command: str
) -> None:
    result = invoke(command, tiny_model(TinySpec()), "--budget", "1KB", stdin="x")
    assert result.exit_code == 2
    assert "KiB" in result.stderr or "MiB" in result.stderr
    assert "Traceback" not in result.output


def test_a_refusal_is_json_too_when_json_was_asked_for(invoke: Invoke, dense_model: Path) -> None:
    result = invoke("plan", dense_model, "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "NotMoEError"
    assert error["problem"] and error["remedy"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plan", "--policy", "magic"], "magic"),
        (["plan", "--io-threads", "many"], "io-threads"),
        (["run", "--prompt", "a", "--prompt-file", "b"], "exclude"),
        (["run", "--prompt-file", "no-such-file"], "no-such-file"),
        (["run", "--engine", "abacus", "-p", "x"], "abacus"),
        (["compare", "--engine", "abacus"], "abacus"),
        (["compare", "--limit", "auto"], "limit"),
        (["compare", "--limit", "lots"], "lots"),
        (["compare", "--limit", "none", "--arms", "stock,abacus"], "abacus"),
        (["compare", "--limit", "none", "--arms", ""], "stock"),
        (["compare", "--limit", "none", "--variant", "lru"], "lru"),
        (["compare", "--limit", "none", "--variant", "x:policy=magic"], "magic"),
        (["compare", "--limit", "none", "--variant", "x:colour=red"], "colour"),
        (["compare", "--limit", "none", "--prompts", "no-such-file"], "no-such-file"),
        (["compare", "--limit", "200%"], "more than the whole model"),
        (["compare", "--limit", "none", "--variant", "x:policy=lru", "--variant", "x:policy=lfu"], "two variants"),
        (["compare", "--limit", "none", "--wait-policy", "patient"], "wait-policy"),
        (["compare", "--output", "64"], "--output needs --scheduler"),
        (["compare", "--prompt", "64"], "--prompt needs --scheduler"),
        (["compare", "--scheduler", "greedy", "--quality-budget", "1%"], "--quality-budget"),
        (["compare", "--scheduler", "greedy", "--timeout", "60"], "--timeout"),
        (["compare", "--scheduler", "greedy", "--requests", "8", "--requests", "16"], "once"),
        (["run", "--trace-tokens", "on", "-p", "x"], "without trace"),
        (["run", "-p", ""], "empty"),
        (["profile", "--at", "25%"], "--at needs --quality"),
        (["profile", "--hard"], "--hard needs --quality"),
        (["profile", "--points", "3"], "--points needs --quality"),
        (["profile", "--quality", "--prompt", "8"], "--prompt"),
        (["profile", "--engine", "transformers", "--prompt", "8"], "--prompt"),
        (["plan", "--no-disk", "--calibrate"], "expertier profile"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_by_name(
    invoke: Invoke, tiny_model: TinyModel, arguments: list[str], named: str
) -> None:
    command, *flags = arguments
    result = invoke(command, tiny_model(TinySpec()), *flags, stdin="x")
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--predictor"], 2),
        (["--quality-budget", "1%", "--sidecar-dir"], 2),
        (["--sidecar-dir"], 0),  # this model needs no sidecar
        (["--profile"], 0),  # a run this short writes none
    ],
)
def test_a_path_that_the_system_refuses_to_look_at_causes_no_traceback(
    invoke: Invoke, tiny_model: TinyModel, tmp_path: Path, flags: list[str], code: int
) -> None:
    path = tmp_path / ("x" * 300)  # root may look into any folder, but not at a name of such a length
    result = invoke("run", tiny_model(TinySpec()), "-p", "x", "-n", 1, *flags, path)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["run", "report", "plan", "simulate"])
def test_a_model_or_record_that_the_system_refuses_to_look_at_is_refused(
    invoke: Invoke, tmp_path: Path, command: str
) -> None:
    result = invoke(command, tmp_path / ("x" * 300), stdin="x")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_an_option_from_the_environment_is_checked_like_a_flag(
    invoke: Invoke, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTIER_POLICY", "magic")
    result = invoke("plan", tiny_model(TinySpec()))
    assert result.exit_code == 2
    assert "magic" in result.stderr


def test_a_directory_without_a_comparison_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("report", tmp_path)
    assert result.exit_code == 2
    assert "comparison.json" in result.stderr


def test_an_output_directory_that_cannot_be_written_is_refused_before_anything_runs(
    invoke: Invoke, tiny_model: TinyModel, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    result = invoke("compare", tiny_model(TinySpec()), "--limit", "none", "--out", blocked / "out")
    assert result.exit_code == 2
    assert "--out" in result.stderr


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "expertier.cli", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOTS},
        **options,
    )


@pytest.mark.engine
def test_an_interrupt_ends_a_run_with_one_line_and_130(tiny_model: TinyModel) -> None:
    running = process("run", tiny_model(TinySpec()), "-p", "x", "-n", "100000", "--n-ctx", "200000", "--threads", 1)
    assert running.stdout is not None
    assert running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors.strip().splitlines()[-1] == "Interrupted."
    assert "Traceback" not in errors + output


def test_a_reader_that_has_seen_enough_causes_no_traceback(tiny_model: TinyModel) -> None:
    running = process("plan", tiny_model(TinySpec()), "--no-disk", "--json")
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    errors = running.stderr.read()
    running.wait(timeout=60)
    assert "Traceback" not in errors and "Exception" not in errors


def test_help_of_every_command_is_printed_without_loading_an_engine() -> None:
    heavy = {"llama_cpp", "numpy", "matplotlib", "gguf", "psutil", "expertier.manager"}
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom expertier.cli.app import app\n"
        "for command in ([], ['doctor'], ['plan'], ['run'], ['compare'], ['report']):\n"
        "    result = CliRunner().invoke(app, [*command, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        f"print(sorted(sys.modules.keys() & {heavy!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": ROOTS},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_version_is_that_of_the_package(invoke: Invoke) -> None:
    from expertier import __version__

    assert invoke("--version").stdout == f"expertier {__version__}\n"
