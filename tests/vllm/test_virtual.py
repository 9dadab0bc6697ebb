"""Virtual experts in vLLM: bias 0 is stock, requests may ask for exactness, unknown routers are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.tiny_hf import HfSpec
from support.vllm_process import engine, error_of, run

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SPEC = HfSpec(layers=4)
SETTINGS = {"max_num_batched_tokens": 64, "max_num_seqs": 4}


def served(model: str, grouped: str) -> dict[str, Any]:
    """What engines answer, in one process."""
    from vllm import SamplingParams

    rng = np.random.default_rng(7)
    prompts = [{"prompt_token_ids": rng.integers(0, 256, 3 + 9 * index).tolist()} for index in range(6)]
    usual = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    exact = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args={"expertier_exact": 1})

    def ask(llm: Any, sampling: Any = usual) -> list[list[int]]:
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    outcome: dict[str, Any] = {}
    for name, checkpoint in (("plain", model), ("grouped", grouped)):
        with engine(checkpoint, **SETTINGS) as llm:
            outcome[f"{name} stock"] = ask(llm)
        with engine(checkpoint, "30%", expertier={"virtual_bias": 0}, **SETTINGS) as llm:
            outcome[f"{name} at 0"] = ask(llm)
        with engine(checkpoint, "30%", expertier={"virtual_bias": 0.5}, **SETTINGS) as llm:
            outcome[f"{name} at 0.5"] = ask(llm)
            outcome[f"{name} stats"] = llm.collective_rpc("expertier_stats")[0]
            outcome[f"{name} mixed"] = ask(llm, [exact, usual] * 3)
            outcome[f"{name} exact"] = ask(llm, exact)
    with engine(model, "30%", **SETTINGS) as llm:
        ask(llm)
        outcome["lossless stats"] = llm.collective_rpc("expertier_stats")[0]
    with engine(model, "40%", expertier={"virtual_hard": "on"}, **SETTINGS) as llm:
        outcome["hard exact"] = ask(llm, exact)
        before = llm.collective_rpc("expertier_stats")[0]
        for _ in range(3):  # one prompt at a time: a step that has a prompt in it may wait
            for prompt in prompts:
                llm.generate(prompt, usual, use_tqdm=False)
        outcome["hard stats"] = [before, llm.collective_rpc("expertier_stats")[0]]
        outcome["hard shrunk"] = llm.collective_rpc("expertier_resize", args=("10%",))[0]["error"]["problem"]
    outcome["hard refused"] = [
        error_of(lambda checkpoint=checkpoint, budget=budget: _start_hard(checkpoint, budget))
        for checkpoint, budget in ((model, "10%"), (grouped, "100%"))
    ]
    outcome["schemes"] = _schemes()
    outcome["unknown"] = _unknown()
    return outcome


def _start_hard(model: str, budget: str) -> None:
    with engine(model, budget, expertier={"virtual_hard": "on"}, **SETTINGS):
        pass


def compiled(model: str) -> dict[str, Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(1, 4 + 9 * index))} for index in range(4)]
    outcome: dict[str, Any] = {}
    for bias in (None, 0, 0.5):
        more = {} if bias is None else {"expertier": {"virtual_bias": bias}}
        with engine(model, None if bias is None else "30%", enforce_eager=False, **more, **SETTINGS) as llm:
            answers = llm.generate(prompts, sampling, use_tqdm=False)
            outcome[str(bias)] = [list(answer.outputs[0].token_ids) for answer in answers]
            if bias:
                outcome["stats"] = llm.collective_rpc("expertier_stats")[0]
    return outcome


def _schemes() -> list[dict[str, Any]]:
    """Whether our arithmetic gives a router's own weights for its own choice, and ranks as it does."""
    import torch

    from expertier.virtual import top_experts
    from expertier_vllm.compat.v032.router import CPURouter, Scoring

    torch.manual_seed(0)
    correction = torch.randn(16) * 0.3
    grouped = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
    found = []
    for more in (
        {"renormalize": True},
        {"renormalize": False},
        {**grouped, "renormalize": True},
        {**grouped, "renormalize": False, "routed_scaling_factor": 2.5},
        {**grouped, "scoring_func": "sigmoid", "renormalize": True},
        {**grouped, "scoring_func": "sigmoid", "e_score_correction_bias": correction, "routed_scaling_factor": 2.5},
    ):
        for dtype in (torch.float32, torch.bfloat16):
            router = CPURouter(top_k=3, global_num_experts=16, **more)
            logits = torch.randn(40, 16).to(dtype)
            weights, ids = router._compute_routing(logits, logits, torch.int32)
            scoring = Scoring(router)
            best = top_experts(scoring.scores(logits)[0], 3)
            found.append(
                {
                    "weights": bool(torch.equal(scoring.weights(logits, ids), weights)),
                    "choice": sum(set(a) == set(b) for a, b in zip(best.tolist(), ids.tolist(), strict=True))
                    / len(ids),
                }
            )
    return found


def _unknown() -> list[str]:
    from types import SimpleNamespace

    import torch

    from expertier.virtual import VirtualSettings
    from expertier_vllm.compat.v032.router import CPURouter, install

    def named(router: Any) -> str:
        runner = SimpleNamespace(routed_experts=SimpleNamespace(managed=object(), layer_name="x"), router=router)
        model: Any = SimpleNamespace(modules=lambda: [torch.nn.Identity(), runner])
        return error_of(lambda: install(model, VirtualSettings(bias=0.1)))

    return [
        named(object()),
        named(CPURouter(top_k=1, global_num_experts=4, custom_routing_function=_unknown)),
        named(CPURouter(top_k=1, global_num_experts=4, scoring_func="sqrtsoftplus")),
    ]


@pytest.fixture(scope="module")
def outcome(checkpoint: Callable[[HfSpec], Path]) -> Any:
    grouped = HfSpec(family="deepseek_v2", layers=3)
    return run(served, str(checkpoint(SPEC)), str(checkpoint(grouped)), timeout=800)


@pytest.mark.parametrize("model", ["plain", "grouped"])
def test_without_bias_the_tokens_are_those_of_stock(outcome: Any, model: str) -> None:
    assert outcome[f"{model} at 0"] == outcome[f"{model} stock"]


@pytest.mark.parametrize("model", ["plain", "grouped"])
def test_with_bias_some_answers_differ_and_the_cost_is_counted(outcome: Any, model: str) -> None:
    assert outcome[f"{model} at 0.5"] != outcome[f"{model} stock"]
    stats = outcome[f"{model} stats"]
    virtual = stats["virtual"]
    # Every token after a prompt, also of steps in which another request's prompt is computed; no token of a prompt.
    assert virtual["bias"] == 0.5 and virtual["tokens"] == 6 * 19
    assert virtual["exact_tokens"] == sum(3 + 9 * index for index in range(6))
    assert all(0 < share < 1 for share in virtual["substituted_share"])
    assert all(0 < mass < 1 for mass in virtual["substituted_mass"])
    assert "lossy: resident experts preferred by 0.5" in stats["mode"]
    assert stats["peak_resident_bytes"] <= stats["budget_bytes"]


def test_bias_saves_loads_against_the_same_budget_exact(outcome: Any) -> None:
    lossless = outcome["lossless stats"]
    assert lossless["virtual"] is None and lossless["mode"].endswith("lossless")
    per_token = [stats["decode"]["misses"] / stats["decode"]["tokens"] for stats in (lossless, outcome["plain stats"])]
    assert per_token[1] < 0.8 * per_token[0]


@pytest.mark.parametrize("model", ["plain", "grouped"])
def test_a_request_that_asks_for_exactness_gets_stocks_tokens_among_others_that_do_not(
    outcome: Any, model: str
) -> None:
    stock = outcome[f"{model} stock"]
    assert outcome[f"{model} exact"] == stock
    assert outcome[f"{model} mixed"][::2] == stock[::2]
    assert outcome[f"{model} mixed"][1::2] != stock[1::2]


def test_in_hard_mode_no_decode_step_waits_and_the_resident_set_follows_the_wishes(outcome: Any) -> None:
    before, after = outcome["hard stats"]
    assert "lossy: resident experts only" in after["mode"]
    assert after["decode"]["tokens"] > before["decode"]["tokens"]
    for count in ("misses", "late", "stall_seconds"):
        assert after["decode"][count] == before["decode"][count]
    assert after["swaps"] > 0
    assert sum(after["virtual"]["substituted_share"]) > 0
    assert after["peak_resident_bytes"] <= after["budget_bytes"]


def test_in_hard_mode_a_request_may_ask_for_exactness(outcome: Any) -> None:
    assert outcome["hard exact"] == outcome["plain stock"]


def test_hard_mode_needs_room_for_a_token_in_every_layer_and_routers_without_groups(outcome: Any) -> None:
    shrunk, (small, grouped) = outcome["hard shrunk"], outcome["hard refused"]
    assert "BudgetError" in small and "in every layer at once" in small
    assert "in every layer at once" in shrunk
    assert "UnsupportedOptionError" in grouped and "groups of experts" in grouped


def test_weights_of_any_choice_are_the_routers_own_arithmetic(outcome: Any) -> None:
    for scheme in outcome["schemes"]:
        assert scheme["weights"]
        assert scheme["choice"] > 0.9  # equal scores in bfloat16 may go either way


def test_unknown_routers_are_refused_by_name(outcome: Any) -> None:
    for error, name in zip(outcome["unknown"], ("object", "custom routing by _unknown", "sqrtsoftplus"), strict=True):
        assert error.startswith("UnsupportedModelError") and name in error and "virtual_" in error


def test_compiled_answers_are_compiled_stocks_without_bias_and_others_with(
    checkpoint: Callable[[HfSpec], Path],
) -> None:
    found = run(compiled, str(checkpoint(SPEC)), timeout=800)
    assert found["0"] == found["None"]
    assert found["0.5"] != found["None"]
    assert sum(found["stats"]["virtual"]["substituted_share"]) > 0
