"""Every family of models gives stock's tokens, or is refused by name."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expertier.catalog import read_catalog
from support.tiny_hf import HfSpec, write_hf
from support.vllm_arms import PROMPT_LENGTHS, Arm, Outcome, run_arms

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "granitemoe", "gpt_oss_bf16")
ARMS = ("50%", "25%", "one token", "25%, sharded")
Arms = Callable[[str], dict[str, Outcome]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arms]:
    """Yield a function that runs stock and all budgets for a family, once."""
    directory = tmp_path_factory.mktemp("models")

    @functools.cache
    def run(family: str) -> dict[str, Outcome]:
        spec = HfSpec(family=family)
        whole = str(write_hf(directory / family, spec))
        sharded = str(write_hf(directory / f"{family}-sharded", HfSpec(family=family, files=3)))
        one_token = spec.top_k * 3 * 2 * spec.hidden * spec.intermediate
        return run_arms(
            [
                Arm(name="stock", model=whole),
                Arm(name="50%", model=whole, expertier={"budget": "50%"}),
                Arm(name="25%", model=whole, expertier={"budget": "25%"}),
                Arm(name="one token", model=whole, expertier={"budget": one_token}),
                Arm(name="25%, sharded", model=sharded, expertier={"budget": "25%"}),
            ]
        )

    yield run
    shutil.rmtree(directory)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_stock(outcomes: Arms, family: str, arm: str) -> None:
    stock, ours = outcomes(family)["stock"], outcomes(family)[arm]
    assert not stock.error and not ours.error
    assert ours.tokens == stock.tokens
    assert len({tuple(tokens) for tokens in stock.tokens or []}) == len(PROMPT_LENGTHS)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_come_and_go_within_the_budget(outcomes: Arms, family: str, arm: str) -> None:
    stats = outcomes(family)[arm].stats
    spec = HfSpec(family=family)
    assert stats is not None
    assert stats["peak_resident_bytes"] <= stats["budget_bytes"] < stats["total_bytes"]
    assert stats["bytes_read"] > 2 * stats["total_bytes"]
    assert stats["total_experts"] == (spec.layers - spec.dense_layers) * spec.experts


def test_experts_that_stock_cannot_compute_are_refused_with_stocks_reason(tmp_path: Path) -> None:
    """Quantised experts need AMX in vLLM's CPU build."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has AMX")
    model = str(write_hf(tmp_path, HfSpec(family="gpt_oss")))
    assert read_catalog(model).by_layer[0].parts[0].type_name == "MXFP4"
    arms = run_arms([Arm(name="stock", model=model), Arm(name="ours", model=model, expertier={"budget": "50%"})])
    for outcome in arms.values():
        assert outcome.tokens is None
        assert "No MXFP4 MoE backend supports" in outcome.error


def test_a_checkpoint_that_lacks_an_expert_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    model = write_hf(tmp_path, HfSpec(files=3))
    (model / "model-00002-of-00003.safetensors").unlink()
    outcome = run_arms([Arm(name="ours", model=str(model), expertier={"budget": "50%"})])["ours"]
    assert outcome.error.startswith("ModelNotFoundError: ")
    assert "names model-00002-of-00003.safetensors, which is missing" in outcome.error
