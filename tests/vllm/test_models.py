"""Every family of models gives stock's tokens, or is refused by name."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

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
        if family == "gpt_oss_bf16":  # biases are there for all experts, and count
            one_token += spec.layers * spec.experts * 2 * (2 * spec.intermediate + spec.hidden)
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


# --- special cases, in one process ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """Stock beside Expertier where types and sizes are unusual."""
    directory = tmp_path_factory.mktemp("special")
    granite = write_hf(directory / "granite", HfSpec(family="granitemoe"))
    narrow = write_hf(directory / "narrow", HfSpec(hidden=96, intermediate=32))
    quantised = write_hf(directory / "quantised", HfSpec(family="gpt_oss"))
    incomplete = write_hf(directory / "incomplete", HfSpec(files=3))
    (incomplete / "model-00002-of-00003.safetensors").unlink()
    models: dict[str, tuple[Path, dict[str, Any]]] = {
        "float32": (granite, {"dtype": "float32"}),
        "float16": (granite, {"dtype": "float16"}),
        "narrow": (narrow, {}),
        "quantised": (quantised, {}),
        "incomplete": (incomplete, {}),
    }
    budgets = {"stock": None, "ours": {"budget": "25%"}}
    yield run_arms(
        [
            Arm(name=f"{name}, {who}", model=str(model), engine=engine, expertier=budget)
            for name, (model, engine) in models.items()
            for who, budget in budgets.items()
        ]
    )
    shutil.rmtree(directory)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_other_types_than_the_checkpoints_give_stocks_tokens(
    special: dict[str, Outcome], dtype: str, size: int
) -> None:
    stock, ours = special[f"{dtype}, stock"], special[f"{dtype}, ours"]
    spec = HfSpec(family="granitemoe")
    assert stock.tokens and ours.tokens == stock.tokens
    assert ours.stats is not None
    assert ours.stats["total_bytes"] == spec.layers * spec.experts * 3 * size * spec.hidden * spec.intermediate


def test_experts_whose_sizes_are_no_multiples_of_pages_give_stocks_tokens(special: dict[str, Outcome]) -> None:
    stock, ours = special["narrow, stock"], special["narrow, ours"]
    assert stock.tokens and ours.tokens == stock.tokens
    assert ours.stats is not None
    assert ours.stats["peak_resident_bytes"] <= ours.stats["budget_bytes"] < ours.stats["total_bytes"]


def test_experts_that_stock_cannot_compute_are_refused_with_stocks_reason(special: dict[str, Outcome]) -> None:
    """Quantised experts need AMX in vLLM's CPU build."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has AMX")
    for who in ("stock", "ours"):
        assert special[f"quantised, {who}"].tokens is None
        assert "No MXFP4 MoE backend supports" in special[f"quantised, {who}"].error


def test_a_missing_shard_is_refused_by_name(special: dict[str, Outcome]) -> None:
    assert special["incomplete, stock"].tokens is None
    error = special["incomplete, ours"].error
    assert error.startswith("ModelNotFoundError: ")
    assert "names model-00002-of-00003.safetensors, which is missing" in error
