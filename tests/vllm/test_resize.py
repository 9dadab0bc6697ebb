"""The budget of vLLM changes while requests are computed: nothing fails, and tokens stay stock's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.tiny_hf import HfSpec
from support.vllm_process import engine, run

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

MB = 1 << 20
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


def governed(model: str, group: str) -> dict[str, Any]:
    from vllm import SamplingParams

    folder = Path(group)
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def serve(llm: Any) -> list[list[int]]:
        prompts: Any = [{"prompt_token_ids": list(range(1, 4 + 17 * index))} for index in range(8)]
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, sampling, use_tqdm=False)]

    def limit(left: int) -> None:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        (folder / "memory.limit_in_bytes").write_text(str(int(stat["total_rss"]) + left))

    with engine(model, **SETTINGS) as llm:
        stock = serve(llm)
    with engine(model, "80%", expertier={"governor": "on"}, **SETTINGS) as llm:

        def budget_after(change: Callable[[int], bool]) -> int:
            deadline = time.monotonic() + 60
            while not change(now := llm.collective_rpc("expertier_stats")[0]["budget_bytes"]):
                assert time.monotonic() < deadline, now
                time.sleep(0.1)
            return int(now)

        answers = [serve(llm)]
        first = budget_after(lambda budget: True)
        limit(100 * MB)
        pressed = budget_after(lambda budget: budget < first)
        answers.append(serve(llm))
        limit(4096 * MB)
        after = budget_after(lambda budget: budget > pressed)
        answers.append(serve(llm))
    kills = (folder / "memory.oom_control").read_text()
    return {"stock": stock, "answers": answers, "budgets": [first, pressed, after], "kills": kills}


@pytest.mark.root
def test_the_governor_gives_memory_back_under_a_real_limit_and_takes_it_again(
    checkpoint: Callable[[HfSpec], Path], memory_group: Callable[[int], Path]
) -> None:
    found = run(governed, str(checkpoint(SPEC)), str(memory_group(16384 * MB)))
    assert found["answers"] == 3 * [found["stock"]]
    first, pressed, after = found["budgets"]
    assert pressed < after <= first
    assert "oom_kill 0" in found["kills"]
