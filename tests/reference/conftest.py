"""A tiny reference model, trained for seconds, shared by the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from reference_model.build import reference_base
from reference_model.checkpoint import Checkpoint
from reference_model.config import ReferenceConfig


@pytest.fixture(scope="session")
def tiny_config() -> ReferenceConfig:
    return ReferenceConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )


@pytest.fixture(scope="session")
def base(tiny_config: ReferenceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTIER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return reference_base(minutes=0.05, config=tiny_config, progress=False)


@pytest.fixture(scope="session")
def checkpoint(base: Path) -> Checkpoint:
    return Checkpoint(base)


@pytest.fixture(scope="session")
def held_out_texts(base: Path) -> list[str]:
    import json

    prompts = json.loads((base / "prompts.json").read_text(encoding="utf-8"))
    # One of every domain: several alphabets, code, tables and prose.
    return list({prompt["domain"]: prompt["text"] for prompt in prompts}.values())
