"""Requests that share experts join together, and nothing else changes: every request's text, its end, its priority."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.tiny_hf import HfSpec
from support.vllm_process import engine, error_of, run

SPEC = HfSpec(layers=3)
NAME = "expertier_vllm.RegroupingScheduler"
REQUESTS = 18


def prompts() -> list[list[int]]:
    """Two kinds of text, mixed: tokens below 120 and above 140; some longer than a step."""
    import numpy as np

    rng = np.random.default_rng(3)
    kinds = ((2, 120), (140, 256))
    return [rng.integers(*kinds[index % 2], 8 + 9 * (index % 9)).tolist() for index in range(REQUESTS)]


def drive(llm: Any, requests: dict[str, tuple[list[int], int, int]], after: dict[int, Callable[[], None]]) -> Any:
    """Serve requests (prompt, tokens, priority); returns tokens by request, and requests by their first token."""
    from vllm import SamplingParams

    inner = llm.llm_engine
    for name, (prompt, tokens, priority) in requests.items():
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        inner.add_request(name, {"prompt_token_ids": prompt}, sampling, priority=priority)
    got: dict[str, list[int]] = {}
    begun: list[str] = []
    step = 0
    while inner.has_unfinished_requests():
        after.get(step, lambda: None)()
        step += 1
        for output in inner.step():
            if output.outputs[0].token_ids and output.request_id not in got:
                begun.append(output.request_id)
            got[output.request_id] = list(output.outputs[0].token_ids)
    return got, begun


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


class Raising:
    name = "raising"

    def choose(self, now: Any) -> Any:
        raise RuntimeError("no idea")


def behaviour(model: str) -> dict[str, Any]:
    common = {"dtype": "float32", "max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": True}
    mixed = prompts()
    burst = {str(index): (prompt, 6, 0) for index, prompt in enumerate(mixed)}
    found: dict[str, Any] = {}
    with engine(model, "50%", **common) as llm:
        found["plain class"] = type(scheduler_of(llm)).__name__
        found["alone"] = [drive(llm, {"only": (prompt, 6, 0)}, {})[0]["only"] for prompt in mixed]

    # Priorities, and a KV cache so small that requests are preempted.
    more = {"scheduling_policy": "priority", "num_gpu_blocks_override": 8, "block_size": 32, "max_model_len": 160}
    with engine(model, "50%", scheduler_cls=NAME, **(common | more)) as llm:
        scheduler = scheduler_of(llm)
        preempt, preempted = scheduler._preempt_request, []

        def counted(request: Any, *arguments: Any, **keywords: Any) -> None:
            preempted.append(request.request_id)
            preempt(request, *arguments, **keywords)

        scheduler._preempt_request = counted
        ranked = {str(index): (prompt, 40, 2 - index // 6) for index, prompt in enumerate(mixed)}
        got, begun = drive(llm, ranked, {})
        found["ranked"], found["begun"], found["preempted"] = got, begun, len(preempted)
        found["alone for 40"] = {name: drive(llm, {name: ask}, {})[0][name] for name, ask in ranked.items()}

    with engine(model, "50%", expertier={"scheduler": "similarity"}, **common) as llm:
        scheduler = scheduler_of(llm)
        found["class"] = type(scheduler).__name__
        scheduler.admission.worth.mode = "on"
        drive(llm, {f"warm {index}": (prompt, 2, 0) for index, prompt in enumerate(mixed)}, {})
        found["known tokens"] = scheduler.admission.book.known_tokens
        before = scheduler.admission.stats.joined
        found["burst"], found["order"] = drive(llm, burst, {})
        found["joined"] = scheduler.admission.stats.joined - before
        found["overtakes"] = scheduler.admission.stats.overtakes
        found["resident told"] = float(scheduler._resident.mean())

        # Places stay empty until two are free.
        scheduler.admission.together.size = lambda places: 2
        joined = scheduler.admission.stats.joined
        found["in pairs"] = drive(llm, burst, {})[0]
        found["joined in pairs"] = scheduler.admission.stats.joined - joined
        found["held"] = scheduler.admission.stats.held
        found["in pairs, cancelled"] = drive(llm, burst, {3: lambda: llm.llm_engine.abort_request(list(burst))})[0]
        del scheduler.admission.together.size

        # Cancelled while they wait and while they run, as when a client disconnects.
        def cancel() -> None:
            llm.llm_engine.abort_request(["17", "0"])

        found["cancelled"] = drive(llm, burst, {3: cancel})[0]
        found["left over"] = [len(scheduler.admission.waiting()), len(scheduler.requests), len(scheduler.waiting)]
        found["refused"] = [
            error_of(lambda: drive(llm, {"none": ([], 4, 0)}, {})),
            error_of(lambda: drive(llm, {"long": ([5] * 600, 4, 0)}, {})),
        ]
        found["identical"] = drive(llm, {f"same {index}": (mixed[0], 6, 0) for index in range(9)}, {})
        found["single"] = drive(llm, {"single": (mixed[1], 6, 0)}, {})[0]

        scheduler.admission.batcher = Raising()
        found["failing"], found["failing order"] = drive(llm, burst, {})
        found["failures"] = scheduler.admission.stats.failures
    return found


@pytest.fixture(scope="module")
def found(checkpoint: Callable[[HfSpec], Path]) -> Any:
    pytest.importorskip("vllm")
    return run(behaviour, str(checkpoint(SPEC)), timeout=500)


engines = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


class TestInVllm:
    pytestmark = engines

    def test_each_request_gets_the_tokens_it_gets_alone(self, found: Any) -> None:
        assert found["burst"] == {str(index): tokens for index, tokens in enumerate(found["alone"])}
        assert len({tuple(tokens) for tokens in found["alone"]}) > REQUESTS // 2

    def test_requests_of_one_kind_join_together(self, found: Any) -> None:
        order = [int(name) % 2 for name in found["order"]]
        changes = sum(first != second for first, second in itertools.pairwise(order))
        assert found["overtakes"] > 0
        assert changes < REQUESTS // 2, f"kinds in the order of their first tokens: {order}"

    def test_routes_and_residency_reach_the_scheduler(self, found: Any) -> None:
        assert found["known tokens"] > 100
        assert 0.2 < found["resident told"] <= 0.51

    def test_every_request_joins_once(self, found: Any) -> None:
        assert found["joined"] == REQUESTS

    def test_places_that_stay_empty_until_two_are_free_change_nobodys_tokens(self, found: Any) -> None:
        assert found["held"] > 0
        assert found["in pairs"] == found["burst"]
        assert found["joined in pairs"] == REQUESTS
        assert all(len(tokens) < 6 for tokens in found["in pairs, cancelled"].values())

    def test_requests_that_clients_left_do_not_disturb_the_others(self, found: Any) -> None:
        others = {str(index): tokens for index, tokens in enumerate(found["alone"]) if index not in (0, 17)}
        assert {name: tokens for name, tokens in found["cancelled"].items() if name in others} == others
        assert len(found["cancelled"].get("17", [])) < 6
        assert found["left over"] == [0, 0, 0]

    def test_prompts_that_are_empty_or_too_long_are_refused_and_the_rest_goes_on(self, found: Any) -> None:
        assert all("Error" in refused for refused in found["refused"])
        assert found["single"]["single"] == found["alone"][1]

    def test_identical_requests_get_the_same_tokens(self, found: Any) -> None:
        got, begun = found["identical"]
        assert got == {f"same {index}": found["alone"][0] for index in range(9)}
        assert sorted(begun) == sorted(got)

    def test_when_regrouping_fails_requests_are_served_in_order_of_arrival(self, found: Any) -> None:
        assert found["failing"] == found["burst"]
        assert found["failures"] == 1
        assert found["failing order"][:4] == ["0", "1", "2", "3"]

    def test_priorities_come_before_similarity_and_preempted_requests_lose_nothing(self, found: Any) -> None:
        ranks = [2 - int(name) // 6 for name in found["begun"]]
        # Within a step, tokens come in the engine's order: compare by the batch of four.
        assert max(ranks[:4]) == 0 and ranks[-4:] == [2] * 4
        assert found["preempted"] > 0
        assert found["ranked"] == found["alone for 40"]

    def test_both_ways_of_asking_give_the_same_scheduler(self, found: Any) -> None:
        assert found["class"] == "RegroupingScheduler"
        assert found["plain class"] == "ExpertierScheduler"


def refusals(model: str) -> dict[str, str]:
    other = "vllm.v1.core.sched.scheduler.Scheduler"

    def ask(budget: str | None, **arguments: Any) -> str:
        def start() -> None:
            with engine(model, budget, **arguments):
                pass

        return error_of(start)

    return {
        "unknown": ask("50%", expertier={"scheduler": "best"}),
        "two": ask("50%", expertier={"scheduler": "greedy"}, scheduler_cls=other),
        "without": ask(None, scheduler_cls=NAME),
    }


@pytest.mark.engine
@pytest.mark.slow
def test_what_cannot_be_combined_is_refused(checkpoint: Callable[[HfSpec], Path]) -> None:
    pytest.importorskip("vllm")
    found = run(refusals, str(checkpoint(SPEC)), timeout=300)
    assert "Choose from: fcfs" in found["unknown"]
    assert "exclude each other" in found["two"]
    assert "without Expertier" in found["without"]
