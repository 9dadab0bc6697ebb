"""What the tests of the command line share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from expertier.cli.app import app
from expertier.config import ENV_PREFIX
from support.raw_gguf import F32, STRING, TYPE_F32, U32, Tensor, Value, build

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No option and no cache of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EXPERTIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def invoke() -> Invoke:
    """Run the command line in this process."""

    def run(*arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return run


@pytest.fixture
def invoke_json(invoke: Invoke) -> Callable[..., Any]:
    """Run a command that must succeed and parse what it prints, as strictly as any parser would."""

    def run(*arguments: object, stdin: str | None = None) -> Any:
        result = invoke(*arguments, "--json", stdin=stdin)
        assert result.exit_code == 0, result.output
        return strict_json(result.stdout)

    return run


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def dense_model(tmp_path: Path) -> Iterator[Path]:
    """A valid model without experts."""
    path = tmp_path / "dense.gguf"
    keys = {
        "general.architecture": Value(STRING, "llama"),
        "llama.block_count": Value(U32, 1),
        "llama.rope.freq_base": Value(F32, 1e4),
    }
    path.write_bytes(build(keys, [Tensor("token_embd.weight", TYPE_F32, (32, 8))]))
    yield path
