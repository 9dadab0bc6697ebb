"""Teacher forcing, quality profiles and quality budgets through vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.tiny_hf import HfSpec
from support.vllm_process import engine, error_of, run

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SPEC = HfSpec(layers=3)
SETTINGS = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def profiled(model: str, other: str, texts: str) -> dict[str, Any]:
    """Measure through the command line, then serve with what was measured."""
    import os

    from typer.testing import CliRunner
    from vllm import SamplingParams

    from expertier.catalog import read_catalog
    from expertier.cli.app import app
    from expertier.quality.profile import profile_paths

    arguments = ["profile", model, "--engine", "vllm", "--quality", "--text", texts, "--at", "50%", "--points", "2"]
    arguments.append("--hard")
    measured = CliRunner().invoke(app, [*arguments, "--tokens-per-text", "16", "--threads", "1", "--json"])
    assert measured.exit_code == 0, measured.output
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # the command has its own size of the KV cache
    outcome: dict[str, Any] = {"profile": json.loads(measured.stdout)["profile"]}
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [{"prompt_token_ids": [5 + index, 9]} for index in range(4)]
    with engine(model, "50%", expertier={"quality_budget": "90%"}, **SETTINGS) as llm:
        llm.generate(prompts, sampling, use_tqdm=False)
        outcome["served"] = llm.collective_rpc("expertier_stats")[0]
        llm.collective_rpc("expertier_resize", args=("30%",))
        llm.generate(prompts, sampling, use_tqdm=False)
        outcome["shrunk"] = llm.collective_rpc("expertier_stats")[0]

    with engine(_without_numbers(Path(model)), "30%", expertier={"virtual_bias": 0.5}, **SETTINGS) as llm:
        answers = llm.generate(prompts[:1], sampling, use_tqdm=False)
        outcome["no numbers"] = [(answer.outputs[0].finish_reason, answer.outputs[0].stop_reason) for answer in answers]

    def refused(checkpoint: str = model, budget: str = "50%", **options: Any) -> str:
        def begin() -> None:
            with engine(checkpoint, budget, expertier=options, **SETTINGS):
                pass

        return error_of(begin)

    outcome["refused"] = {
        "none": refused(other, quality_budget="1%"),
        "less": refused(budget="30%", quality_budget="1%"),
        "rivals": refused(quality_budget="1%", virtual_bias=0.2),
        "hard": refused(quality_budget="0.0001%", virtual_hard="on"),
    }
    profile_paths(read_catalog(Path(other)), None)[0].write_bytes(
        profile_paths(read_catalog(Path(model)), None)[0].read_bytes()
    )
    outcome["refused"]["foreign"] = refused(str(other), quality_budget="1%")
    return outcome


def _without_numbers(model: Path) -> str:
    """A copy of a checkpoint whose second router says nothing."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(
        model, model.with_name(f"{model.name}-broken"), ignore=shutil.ignore_patterns("*expertier*")
    )
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("layers.1.mlp.gate.weight"):
                tensors[name] = torch.full_like(tensors[name], float("nan"))
        save_file(tensors, file, {"format": "pt"})
    return str(broken)


@pytest.fixture(scope="module")
def outcome(checkpoint: Callable[[HfSpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("quality")
    rng = np.random.default_rng(3)
    texts = [{"domain": "ab"[seed % 2], "text": "".join(rng.choice(list(LETTERS), 40))} for seed in range(5)]
    (folder / "texts.json").write_text(json.dumps(texts))
    other = checkpoint(HfSpec(layers=3, experts=12))
    environment = {"EXPERTIER_CACHE": str(folder / "cache")}
    yield run(
        profiled, str(checkpoint(SPEC)), str(other), str(folder / "texts.json"), environment=environment, timeout=800
    )


def test_a_profile_measured_in_vllm_has_exact_points_that_cost_nothing_and_lossy_ones_that_do(outcome: Any) -> None:
    profile = outcome["profile"]
    assert profile["engine"] == "vLLM" and profile["texts"] == 5
    points = [point for point in profile["points"] if not point["hard"]]
    exact, *lossy = sorted(points, key=lambda point: point["bias"])
    assert exact["kl"]["high"] == 0.0 and exact["agreement"] == 1.0
    assert lossy
    for point in lossy:
        assert point["kl"]["middle"] > 0 and all(mass > 0 for mass in point["substituted"])
        assert 0 < point["loads_per_token"] < exact["loads_per_token"]


def test_the_cost_of_hard_mode_is_measured_in_vllm_too(outcome: Any) -> None:
    points = outcome["profile"]["points"]
    [hard] = [point for point in points if point["hard"]]
    [exact] = [point for point in points if not point["bias"] and not point["hard"]]
    assert hard["kl"]["middle"] > 0
    assert hard["loads_per_token"] < exact["loads_per_token"]  # what is left are the texts' first tokens: prompts


def test_a_percentage_is_resolved_watched_and_told(outcome: Any) -> None:
    served = outcome["served"]
    assert "at most 90% perplexity" in served["mode"] and "lossy" in served["mode"]
    assert served["virtual"]["bias"] > 0
    quality = served["quality"]
    assert quality["allowed"] == pytest.approx(0.9)
    assert 0 < quality["bias"] <= quality["calibrated_bias"]
    assert quality["tokens"] > 0 and quality["estimated_kl"] > 0


def test_with_less_memory_than_was_measured_a_running_server_becomes_exact_and_says_so(outcome: Any) -> None:
    shrunk = outcome["shrunk"]
    assert shrunk["virtual"]["bias"] == 0.0
    assert "exact: The quality profile begins at 50 %" in shrunk["mode"]


def test_scores_that_are_no_numbers_end_the_requests_of_the_step_and_not_the_server(outcome: Any) -> None:
    [[reason, problem]] = outcome["no numbers"]
    assert reason == "error" and "not numbers (NaN)" in problem


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("none", "QualityProfileError", "--quality --engine vllm --text FILES"),
        ("foreign", "QualityProfileError", "is of another model"),
        ("less", "QualityBudgetError", "the memory budget holds 30 %"),
        ("rivals", "QualityBudgetError", "contradict each other"),
        ("hard", "QualityBudgetError", "eave hard mode"),
    ],
)
def test_what_cannot_be_promised_is_refused_by_name(outcome: Any, case: str, error: str, words: str) -> None:
    assert error in outcome["refused"][case] and words in outcome["refused"][case]
