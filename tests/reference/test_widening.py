from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from reference_model.build import main
from reference_model.checkpoint import Checkpoint
from reference_model.export_hf import export_hf
from reference_model.model import load_model
from reference_model.tokenizer import load_tokenizer
from reference_model.verify import compare, torch_logits
from reference_model.widen import SizeError, choose_factor, granule, parse_size, scales


@pytest.fixture(scope="module")
def ids(base: Path, held_out_texts: list[str]) -> list[int]:
    tokenizer = load_tokenizer(base)
    return [token for text in held_out_texts for token in tokenizer.encode(text[:200]).ids[:40]][:300]


@pytest.mark.parametrize("factor", [2, 6, 16])
def test_a_widened_model_routes_and_writes_like_its_base(
    checkpoint: Checkpoint, ids: list[int], factor: int, tmp_path: Path
) -> None:
    export_hf(checkpoint, tmp_path, factor=factor)
    wide = Checkpoint(tmp_path)
    assert wide.config.moe_intermediate_size == factor * checkpoint.config.moe_intermediate_size
    one, first = torch_logits(checkpoint, ids)
    two, second = torch_logits(wide, ids)
    found = compare(ids, one, two, (first, second))
    exact = factor & (factor - 1) == 0
    # Division by a power of two is exact in bfloat16; other factors round the weights once more.
    assert found.logit_difference < (1e-4 if exact else 0.3)
    assert min(found.same_routes) >= (1.0 if exact else 0.9)


@pytest.mark.parametrize("factor", [1, 2, 3, 8, 20, 96])
def test_the_scales_of_a_factor_multiply_to_its_inverse(factor: int) -> None:
    assert math.isclose(math.prod(scales(factor).values()), 1 / factor)


def test_the_plain_torch_model_computes_what_transformers_computes(base: Path, ids: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    own, _ = torch_logits(Checkpoint(base), ids)
    with torch.inference_mode():
        theirs = other(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


def test_shards_hold_every_tensor_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "one", factor=4)
    export_hf(checkpoint, tmp_path / "many", factor=4, shard_size=200_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = load_model(Checkpoint(tmp_path / "one")), load_model(Checkpoint(tmp_path / "many"))
    for (name, left), right in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_the_output_projections_are_scaled_and_the_router_is_not(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path, factor=4)
    wide = Checkpoint(tmp_path)
    gate = "model.layers.1.mlp.gate.weight"
    np.testing.assert_array_equal(wide.tensor(gate), checkpoint.tensor(gate))
    down, base_down = wide.expert(0, 3, "down"), checkpoint.expert(0, 3, "down")
    np.testing.assert_array_equal(down, np.tile(base_down * scales(4)["down"], (1, 4)))


@pytest.mark.parametrize(
    ("text", "size"), [("1GB", 10**9), ("4.8 GB", 4_800_000_000), ("900MiB", 900 * 2**20), (12345, 12345)]
)
def test_sizes_are_read_with_their_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["big", "-1GB", "1XB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SizeError, match="is not a size"):
        parse_size(text)


def test_the_factor_prefers_a_power_of_two_close_by_and_whole_blocks_always() -> None:
    assert choose_factor(1_000_000, 0, 15_500, 2) == 64
    assert choose_factor(1_000_000, 0, 21_000, 2) == 48
    assert granule(128) == 2
    assert granule(32) == 8
    assert granule(768) == 1


def test_a_size_below_the_smallest_model_is_refused_with_that_size() -> None:
    with pytest.raises(SizeError, match="at least 3MB"):
        choose_factor(1_000_000, 1_000_000, 1_000_000, 2)


def test_the_command_line_names_what_is_wrong_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--from", str(tmp_path / "nowhere"), "--quiet"]) == 1
    assert "cannot be read" in capsys.readouterr().err
