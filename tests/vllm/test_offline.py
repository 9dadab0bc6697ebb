"""An engine driven step by step: what becomes of requests that fail in the middle. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from expertier.errors import ExpertLoadError
from expertier_vllm.offline import Steps


class FailingEngine:
    """Answers a token in its first step, and in the second ends the request as our scheduler does."""

    def __init__(self) -> None:
        self.steps = 0

    def add_request(self, *_: Any) -> None:
        pass

    def has_unfinished_requests(self) -> bool:
        return self.steps < 2

    def step(self) -> list[Any]:
        self.steps += 1
        failed = self.steps == 2
        answer = SimpleNamespace(
            token_ids=[7],
            finish_reason="error" if failed else None,
            stop_reason="The disk is gone." if failed else None,
        )
        return [SimpleNamespace(request_id="0", outputs=[answer], finished=failed)]


def test_a_request_that_failed_is_an_error_and_not_a_short_answer() -> None:
    steps = Steps(SimpleNamespace(llm_engine=FailingEngine()), [[1, 2]], None)
    with pytest.raises(ExpertLoadError, match="The disk is gone"):
        list(steps)
    assert steps.answers[0].tokens == [7]
