"""A predictor moves bytes and nothing else in vLLM, too; and what is recorded is what was computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertier.routing import read_trace
from expertier.routing.trace_format import PREFILL
from support.tiny_hf import HfSpec
from support.vllm_process import engine, run

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SPEC = HfSpec(layers=4)
SETTINGS = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "enable_prefix_caching": True}
PREFIX = list(range(5, 140))  # longer than a block of the KV cache, which has 128 tokens
GIVEN = [(list(range(100, 130)), 9), ([7, 3, 3, 9, 250], 1)]
PROMPTS = [[*PREFIX, 7], list(range(40)), [3], [*PREFIX, 9, 11]]


def answers(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    tokens = []
    for prompts in (PROMPTS[:3], PROMPTS[3:]):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        tokens += [list(answer.outputs[0].token_ids) for answer in llm.generate(requests, sampling, use_tqdm=False)]
    return tokens


def all_answers(model: str, folder: str) -> dict[str, Any]:
    """Stock, then a wrong predictor, then a recording; the worker lives in this process."""
    from expertier.routing.predictor import RoutedModel
    from expertier_vllm import runtime
    from support.predictors import WrongPredictor

    with engine(model, **SETTINGS) as llm:
        outcome: dict[str, Any] = {"stock": answers(llm)}
    made = []

    def wrong(option: str, catalog: Any, *rest: Any) -> WrongPredictor:
        made.append(WrongPredictor(RoutedModel.of_catalog(catalog)))
        return made[0]

    found, runtime.open_predictor = runtime.open_predictor, wrong
    try:
        with engine(model, "40%", expertier={"lookahead": "on"}, **SETTINGS) as llm:
            outcome["wrong"] = answers(llm)
            outcome["stats"] = llm.collective_rpc("expertier_stats")[0]
            outcome["told"] = list(made[0].sequences.values())
    finally:
        runtime.open_predictor = found
    trace = f"{folder}/vllm.trace"
    options = {"trace": trace, "trace_tokens": "on", "trace_hidden": 4}
    with engine(model, "100%", expertier=options, **SETTINGS) as llm:
        outcome["recorded"] = answers(llm)
    return outcome


def followed(model: str, trace: str) -> list[int]:
    """Feed given tokens; return the steps each text took."""
    from expertier_vllm.adapter import VllmSession
    from expertier_vllm.offline import open_engine

    options = {"budget": "50%", "trace": trace, "trace_tokens": "on"}
    llm = open_engine(
        Path(model),
        options,
        context=128,
        step_tokens=64,
        requests=1,
        cache_bytes=64 << 20,
        processors=("expertier_vllm.given:GivenTokens",),
    )
    session = VllmSession(llm, 1)
    steps = [sum(1 for _ in session.follow(text, prompt=prompt)) for text, prompt in GIVEN]
    session.note({"domains": ["a", "b"]})
    session.close()
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def outcome(checkpoint: Callable[[HfSpec], Path], folder: Path) -> Any:
    return run(all_answers, str(checkpoint(SPEC)), str(folder), timeout=600)


def test_a_wrong_predictor_changes_no_token_and_keeps_the_budget(outcome: Any) -> None:
    assert outcome["wrong"] == outcome["stock"]
    stats = outcome["stats"]
    assert stats["prefetches"] > 8
    assert stats["peak_resident_bytes"] <= stats["budget_bytes"]
    assert "prediction by wrong + lookahead" in stats["mode"]


def test_the_predictor_was_told_every_token_of_every_request(outcome: Any) -> None:
    expected = [prompt + answer[:-1] for prompt, answer in zip(PROMPTS, outcome["stock"], strict=True)]
    assert sorted(outcome["told"]) == sorted(expected), "a prefix from the cache included"


def test_a_trace_has_every_computed_token_in_every_layer(outcome: Any, folder: Path) -> None:
    assert outcome["recorded"] == outcome["stock"]
    trace = read_trace(folder / "vllm.trace", least_tokens=2)
    assert trace.header.engine == "vllm"
    assert [layer.layer for layer in trace.header.layers] == list(range(SPEC.layers))
    known: dict[int, dict[int, int]] = {}
    calls = rows = 0
    for block in trace.blocks():
        calls += len(block.call_layer)
        rows += int(block.call_rows.sum())
        for request, position, token in zip(block.request, block.position, block.token_id, strict=True):
            known.setdefault(int(request), {})[int(position)] = int(token)
        assert (block.experts < SPEC.experts).all()
        assert np.isfinite(block.weights).all()
    assert calls == SPEC.layers * trace.counts.steps
    assert rows == SPEC.layers * trace.counts.tokens
    texts = [prompt + answer[:-1] for prompt, answer in zip(PROMPTS, outcome["stock"], strict=True)]
    for tokens in known.values():
        assert any(all(text[place : place + 1] == [token] for place, token in tokens.items()) for text in texts)
    assert len(known) == len(PROMPTS)


def test_given_tokens_are_computed_one_by_one_whatever_the_model_would_have_said(
    checkpoint: Callable[[HfSpec], Path], folder: Path
) -> None:
    assert run(followed, str(checkpoint(SPEC)), str(folder / "given.trace"), timeout=300) == [22, 5]
    trace = read_trace(folder / "given.trace", least_tokens=2)
    requests: dict[int, list[int]] = {}
    phases: list[int] = []
    for block in trace.blocks():
        phases += block.phase.tolist()
        for request, token in zip(block.request.tolist(), block.token_id.tolist(), strict=True):
            requests.setdefault(request, []).append(token)
    assert list(requests.values()) == [text for text, _ in GIVEN]
    assert phases.count(PREFILL) == 1, "a prompt of one token is a step like any other"
    assert trace.notes["domains"] == ["a", "b"]
