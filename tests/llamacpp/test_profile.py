"""What one run of llama.cpp learned is there when the next one loads, and changes no bit of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from expertier.errors import ProfileError
from llamacpp.engines import closing, expertier, sizes, stock_trace, trace
from support.tiny_gguf import TinySpec

pytestmark = pytest.mark.engine

TinyModel = Callable[[TinySpec], Path]
PLAIN = TinySpec(experts=16)
STEPS = 30


def test_a_run_leaves_a_profile_that_warms_the_next_one_with_the_same_logits(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tiny_model(PLAIN)
    profile = tmp_path / "run.json"
    rows = stock_trace(path, steps=STEPS)
    budget = sizes(path).total * 3 // 4
    for _ in range(2):
        with closing(expertier(path, budget, expert_profile=str(profile))) as llm:
            assert trace(llm, steps=STEPS) == rows
        assert profile.exists()


def test_a_damaged_profile_that_was_named_is_refused_before_the_model_loads(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ProfileError, match="is not a profile"):
        expertier(tiny_model(PLAIN), "50%", expert_profile=str(tmp_path / "run.json"))
