"""Teacher forcing through llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertier.comparison.prompts import Text
from expertier.quality import Reference, evaluate, samples
from expertier_llamacpp.adapter import LlamaCppSession
from llamacpp.engines import TEXT, expertier
from support.tiny_gguf import TinySpec, write_tiny

pytestmark = pytest.mark.engine


@pytest.fixture
def session(tmp_path: Path) -> LlamaCppSession:
    return LlamaCppSession(expertier(write_tiny(tmp_path / "tiny.gguf", TinySpec()), "50%"))


def test_an_exact_model_under_a_budget_differs_from_itself_in_nothing(session: LlamaCppSession) -> None:
    texts = samples(session, [Text(domain="a", text=TEXT), Text(domain="b", text=TEXT[::-1])], count=2, tokens=20)
    with Reference(session, texts) as reference:
        found = evaluate(session, reference, warm_up=texts[0].tokens)
    assert found.kl == 0.0
    assert found.agreement == 1.0
    assert found.bytes_per_token > 0
    session.close()
