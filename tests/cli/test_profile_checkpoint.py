"""``expertier profile --engine transformers``: routes of a checkpoint without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from expertier.catalog import read_catalog
from expertier.routing import read_trace
from support.tiny_gguf import TinySpec
from support.tiny_hf import HfSpec, write_hf

TEXT = "Some words of a text that is long enough to be read. " * 4

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_the_recorded_routes_are_those_of_the_models_routers(
    invoke_json: Callable[..., Any], tmp_path: Path, text: Path, family: str
) -> None:
    folder = write_hf(tmp_path / "tiny", HfSpec(family=family))
    out = tmp_path / "routes.trace"
    result = invoke_json(
        "profile", folder, "--engine", "transformers", "--text", text, "--out", out, "--tokens-per-text", "24",
        "--trace-tokens", "on",
    )  # fmt: skip
    assert result["tokens"] == 24 and result["token_ids"] and result["stats"] is None
    catalog = read_catalog(folder)
    trace = read_trace(out, fingerprint=catalog.fingerprint)
    assert trace.header.engine == "transformers" and len(trace.header.routers) == 32
    table = trace.tokens()
    assert trace.notes["domains"] == ["text"]
    assert table.token_id is not None

    # Independently of what transformers returns: by the inputs of the routers' own weights.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[int, Any] = {}
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    assert len(gates) == len(catalog.layers)
    for place, gate in enumerate(gates):
        gate.register_forward_pre_hook(lambda _, args, place=place: inputs.__setitem__(place, args[0]))
    with torch.inference_mode():
        model(torch.from_numpy(table.token_id.astype(np.int64))[None])
    for place, gate in enumerate(gates):
        scores = inputs[place].reshape(24, -1) @ gate.weight.detach().T
        wanted = scores.topk(catalog.layers[place].top_k).indices.numpy()
        np.testing.assert_array_equal(np.sort(table.routes[:, place]), np.sort(wanted))


def test_what_transformers_cannot_tell_is_refused(
    invoke: Callable[..., Result], tmp_path: Path, text: Path, tiny_model: Callable[[TinySpec], Path]
) -> None:
    for model, words in (
        (tiny_model(TinySpec()), "Name a checkpoint"),
        (write_hf(tmp_path / "grouped", HfSpec(family="deepseek_v2")), "chooses groups of experts first"),
    ):
        result = invoke(
            "profile", model, "--engine", "transformers", "--text", text, "--out", tmp_path / "routes.trace"
        )
        assert result.exit_code == 2 and words in result.stderr, result.output
    (tmp_path / "short.txt").write_text("a")
    folder = write_hf(tmp_path / "tiny", HfSpec())
    result = invoke(
        "profile", folder, "--engine", "transformers", "--text", tmp_path / "short.txt", "--out", tmp_path / "x.trace"
    )
    assert result.exit_code == 2 and "even two tokens" in result.stderr
