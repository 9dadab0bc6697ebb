"""Teacher forcing, calibration and quality budgets through llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from expertier.catalog.gguf import read_gguf
from expertier.cli.app import app
from expertier.comparison.prompts import Text
from expertier.errors import QualityBudgetError, QualityProfileError
from expertier.quality import Reference, evaluate, samples
from expertier.quality.profile import profile_paths, read_profile
from expertier.quality.serving import describe_losses
from expertier_llamacpp.adapter import LlamaCppSession
from llamacpp.engines import TEXT, expertier
from support.tiny_gguf import TinySpec, write_tiny

pytestmark = pytest.mark.engine

LETTERS = "".join(chr(letter) for letter in range(97, 123)) + " "


def random_text(seed: int, length: int = 40) -> str:
    return "".join(np.random.default_rng(seed).choice(list(LETTERS), length))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its quality profile, measured through the command line."""
    folder = tmp_path_factory.mktemp("profiled")
    model = write_tiny(folder / "tiny.gguf", TinySpec(experts=8))
    texts = folder / "texts.json"
    texts.write_text(json.dumps([{"domain": "a", "text": random_text(seed)} for seed in range(6)]))
    arguments = ["profile", str(model), "--quality", "--text", str(texts), "--at", "50%", "--points", "2", "--hard"]
    result = CliRunner().invoke(
        app, [*arguments, "--tokens-per-text", "20", "--threads", "1", "--repack", "off", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["profile"]["texts"] == 6
    return model


@pytest.fixture
def unprofiled(profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPERTIER_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copy(profiled, tmp_path / "tiny.gguf"))


def test_an_exact_model_under_a_budget_differs_from_itself_in_nothing(unprofiled: Path) -> None:
    session = LlamaCppSession(expertier(unprofiled, "50%"))
    texts = samples(session, [Text(domain="a", text=TEXT), Text(domain="b", text=TEXT[::-1])], count=2, tokens=20)
    with Reference(session, texts) as reference:
        found = evaluate(session, reference, warm_up=texts[0].tokens)
    session.close()
    assert found.kl == 0.0
    assert found.agreement == 1.0
    assert found.bytes_per_token > 0


def test_a_profile_has_curves_with_intervals_and_the_cost_of_hard_mode(profiled: Path) -> None:
    catalog = read_gguf(profiled)
    profile = read_profile(profile_paths(catalog, None)[0], catalog)
    exact, *lossy = profile.curve(profile.shares[0], 0)
    assert exact.kl.high == 0.0
    assert lossy
    assert all(sum(point.substituted) > 0 and point.kl.middle > 0 for point in lossy)
    assert all(point.increase.low <= point.increase.middle <= point.increase.high for point in lossy)
    assert [point.share for point in profile.points if point.hard] == [pytest.approx(0.5, abs=0.01)]
    assert profile.proxy.rows > 0


def test_a_percentage_is_resolved_watched_and_named_in_the_mode_line(profiled: Path) -> None:
    llama = expertier(profiled, "50%", expert_quality_budget="90%")
    try:
        assert "at most 90% perplexity" in llama.mode_line()
        assert llama.virtual is not None
        assert llama.quality is not None
        assert llama.virtual.bias > 0
        llama.reset()
        for token in llama.tokenize(TEXT.encode())[:40]:
            llama.eval([token])
        found = llama.quality.stats(llama.virtual)
        assert found.tokens >= 32
        assert found.bias <= found.calibrated_bias
        told = json.loads(json.dumps(describe_losses(llama.virtual, llama.quality), allow_nan=False))
        assert told["quality"]["allowed"] == pytest.approx(0.9)
        assert len(told["virtual"]["substituted_mass"]) == len(llama.catalog.layers)
    finally:
        llama.close()


def test_with_less_memory_than_was_measured_a_running_model_becomes_exact(profiled: Path) -> None:
    llama = expertier(profiled, "50%", expert_quality_budget="90%")
    try:
        llama.offload.resize(llama.offload.budget * 6 // 10)
        llama.eval([1])
        assert llama.virtual is not None
        assert llama.virtual.bias == 0.0
        assert "exact" in llama.mode_line()
    finally:
        llama.close()


def test_a_bias_can_be_stated_without_a_profile(unprofiled: Path) -> None:
    llama = expertier(unprofiled, "50%", expert_quality_budget="0.3")
    assert "lossy" in llama.mode_line()
    assert llama.virtual is not None
    assert llama.virtual.bias == 0.3
    llama.close()


def test_exact_stated_in_words_is_lossless(unprofiled: Path) -> None:
    llama = expertier(unprofiled, "50%", expert_quality_budget="exact")
    assert llama.mode_line().endswith("lossless")
    llama.close()


def test_a_percentage_without_a_profile_names_the_command(unprofiled: Path) -> None:
    with pytest.raises(QualityProfileError, match=r"expertier profile tiny\.gguf --quality --text FILES"):
        expertier(unprofiled, "50%", expert_quality_budget="1%")


@pytest.mark.parametrize(
    "options",
    [
        {"expert_quality_budget": "1%", "expert_virtual_bias": 0.2},
        {"expert_quality_budget": "0.1", "expert_virtual_bias": 0.2},
        {"expert_quality_budget": "exact", "expert_virtual_bias": 0.2},
        {"expert_quality_budget": "exact", "expert_virtual_hard": "on"},
        {"expert_quality_budget": "1%", "expert_virtual_protect": 1},
    ],
)
def test_what_contradicts_a_quality_budget_is_refused(options: dict[str, object], profiled: Path) -> None:
    with pytest.raises(QualityBudgetError, match="contradict"):
        expertier(profiled, "50%", **options)


def test_hard_mode_that_cannot_keep_the_percentage_is_refused_with_the_way_out(profiled: Path) -> None:
    with pytest.raises(QualityBudgetError, match=r"In hard mode.*eave hard mode"):
        expertier(profiled, "50%", expert_quality_budget="0.001%", expert_virtual_hard="on")


def test_less_memory_than_was_measured_is_refused_at_start(profiled: Path) -> None:
    with pytest.raises(QualityBudgetError, match="expertier profile"):
        expertier(profiled, "30%", expert_quality_budget="1%")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no text"),
        (["--text", "TEXTS", "--virtual-bias", "0.2"], "Leave out"),
        (["--text", "FEW"], "texts promise nothing"),
        (["--text", "TEXTS", "--at", "1%"], "cannot hold"),
        (["--text", "TEXTS", "--at", "auto"], "definite"),
    ],
)
def test_a_quality_profile_is_refused_with_words(
    arguments: list[str], words: str, unprofiled: Path, tmp_path: Path
) -> None:
    files = {"TEXTS": tmp_path / "texts.json", "FEW": tmp_path / "few.json"}
    files["TEXTS"].write_text(json.dumps([random_text(seed) for seed in range(6)]))
    files["FEW"].write_text(json.dumps([random_text(seed) for seed in range(2)]))
    given = [str(files.get(argument, argument)) for argument in arguments]
    result = CliRunner().invoke(app, ["profile", str(unprofiled), "--quality", "--repack", "off", *given])
    assert result.exit_code == 2
    assert words in result.output
