"""The budget of vLLM changes while requests are computed: nothing fails, and tokens stay stock's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.tiny_hf import HfSpec
from support.vllm_process import engine, run

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

SPEC = HfSpec(layers=4)
SETTINGS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}


def resized(model: str) -> dict[str, Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def serve(llm: Any, between: Callable[[int], None]) -> dict[str, list[int]]:
        for index in range(8):
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": list(range(1, 4 + 17 * index))}, sampling)
        found: dict[str, list[int]] = {}
        step = 0
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            between(step)
            step += 1
        return found

    with engine(model, **SETTINGS) as llm:
        stock = serve(llm, lambda step: None)
    answers: list[dict[str, Any]] = []
    with engine(model, "50%", expertier={"governor": "on"}, **SETTINGS) as llm:

        def turn(step: int) -> None:
            budget = ("25%", "50%", 1000)[step % 3]
            answers.append({"asked": budget, **llm.collective_rpc("expertier_resize", args=(budget,))[0]})

        ours = serve(llm, turn)
        stats = llm.collective_rpc("expertier_stats")[0]
    return {"stock": stock, "ours": ours, "answers": answers, "stats": stats}


def test_tokens_are_stocks_while_the_budget_goes_down_and_up(checkpoint: Callable[[HfSpec], Path]) -> None:
    found = run(resized, str(checkpoint(SPEC)))
    assert found["ours"] == found["stock"]
    total = found["stats"]["total_bytes"]
    for answer in found["answers"]:
        if answer["asked"] == 1000:
            assert answer["error"]["type"] == "BudgetError"
        else:
            assert answer["budget_bytes"] == total * int(answer["asked"][:-1]) // 100
    assert len(found["answers"]) > 20
    assert found["stats"]["peak_resident_bytes"] <= total // 2
    assert found["stats"]["evictions"] > 0
