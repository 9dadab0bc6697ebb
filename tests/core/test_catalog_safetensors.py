from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expertier.catalog import read_catalog
from expertier.catalog.safetensors import content_digest, read_layout, read_safetensors
from expertier.catalog.types import Catalog, ExpertPart
from expertier.errors import (
    ExpertierError,
    ModelFormatError,
    ModelNotFoundError,
    NotMoEError,
    UnsupportedModelError,
)
from support.raw_safetensors import Tensor, build, file_of, table
from support.tiny_gguf import TinySpec
from support.tiny_hf import FAMILIES, HfSpec, write_hf

INDEX = "model.safetensors.index.json"
EXPERTS, HIDDEN, WIDTH = 4, 16, 8


def config_of(**changed: object) -> dict[str, object]:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    return {key: value for key, value in (config | changed).items() if value is not None}


def one_by_one(
    prefix: str = "model.layers.0.mlp.", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Tensor]:
    tensors = []
    for expert in range(EXPERTS):
        for name in reversed(names):
            shape = (HIDDEN, WIDTH) if name == names[2] else (WIDTH, HIDDEN)
            tensors.append(Tensor(f"{prefix}experts.{expert}.{name}.weight", "BF16", shape))
    return tensors


def rest() -> list[Tensor]:
    return [
        Tensor("model.embed_tokens.weight", "BF16", (50, HIDDEN)),
        Tensor("model.layers.0.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)),
        Tensor("model.layers.0.mlp.shared_experts.gate_proj.weight", "BF16", (WIDTH, HIDDEN)),
        Tensor("model.layers.0.mlp.shared_expert.0.up_proj.weight", "BF16", (WIDTH, HIDDEN)),
        Tensor("model.norm.weight", "F32", (HIDDEN,)),
    ]


def save(directory: Path, *shards: Sequence[Tensor], **config: object) -> Path:
    """Write a checkpoint; more than one shard comes with an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_of(**config)))
    if len(shards) == 1:
        (directory / "model.safetensors").write_bytes(build(shards[0]))
        return directory
    placed = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (directory / name).write_bytes(build(shard))
        placed |= {tensor.name: name for tensor in shard}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return directory


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def bytes_of(part: ExpertPart, expert: int) -> list[bytes]:
    return [piece.file.read_bytes()[piece.offset :][: piece.nbytes] for piece in part.pieces(expert)]


def by_role(catalog: Catalog, layer: int = 0) -> dict[str, ExpertPart]:
    return {part.role: part for part in catalog.by_layer[layer].parts}


def refusal(path: Path) -> str:
    with pytest.raises(ExpertierError) as caught:
        read_safetensors(path)
    assert caught.value.remedy
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save(tmp_path / "m", [*rest(), *one_by_one()])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = [*rest(), *one_by_one()]
    return save(tmp_path / "m", tensors[:7], tensors[7:9], tensors[9:])


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["single", "sharded"])
def test_every_expert_lies_where_the_catalog_says(checkpoint: str, request: pytest.FixtureRequest) -> None:
    catalog = read_safetensors(request.getfixturevalue(checkpoint))
    content = {tensor.name: tensor.content() for tensor in one_by_one()}
    assert [part.role for part in catalog.layers[0].parts] == ["gate", "up", "down"]
    for part in catalog.layers[0].parts:
        assert part.expert_bytes == 2 * HIDDEN * WIDTH
        for expert in range(EXPERTS):
            assert bytes_of(part, expert) == [content[part.name.replace("*", str(expert))]]


def test_experts_stored_one_by_one_have_no_stride(single: Path) -> None:
    part = read_safetensors(single).layers[0].parts[0]
    assert part.name == "model.layers.0.mlp.experts.*.gate_proj.weight"
    assert part.shape == (EXPERTS, WIDTH, HIDDEN)
    with pytest.raises(ValueError, match="common distance"):
        _ = part.stride


def test_sizes_add_up_and_shared_experts_are_no_experts(sharded: Path) -> None:
    catalog = read_safetensors(sharded)
    assert catalog.total_expert_bytes == sum(tensor.nbytes for tensor in one_by_one())
    assert catalog.other_bytes == sum(tensor.nbytes for tensor in rest())
    assert catalog.file_bytes == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    assert len(catalog.files) == 3
    assert (catalog.format, catalog.architecture, catalog.block_count) == ("safetensors", "qwen3_moe", 2)
    assert (catalog.expert_count, catalog.layers[0].top_k, catalog.path) == (EXPERTS, 2, sharded)


def test_the_matrices_of_mixtral_are_told_apart(tmp_path: Path) -> None:
    tensors = one_by_one("model.layers.0.block_sparse_moe.", ("w1", "w3", "w2"))
    parts = by_role(read_safetensors(save(tmp_path / "m", tensors)))
    assert {role: part.name.split(".")[-2] for role, part in parts.items()} == {"gate": "w1", "up": "w3", "down": "w2"}


def test_fused_matrices_lie_at_a_stride(tmp_path: Path) -> None:
    tensors = [
        Tensor("model.layers.0.block_sparse_moe.output_linear.weight", "BF16", (EXPERTS, HIDDEN, WIDTH)),
        Tensor("model.layers.0.block_sparse_moe.input_linear.weight", "BF16", (EXPERTS, 2 * WIDTH, HIDDEN)),
        Tensor("model.layers.0.shared_mlp.input_linear.weight", "BF16", (2 * WIDTH, HIDDEN)),
    ]
    catalog = read_safetensors(save(tmp_path / "m", tensors))
    assert [part.role for part in catalog.layers[0].parts] == ["gate_up", "down"]
    gate_up = catalog.layers[0].parts[0]
    assert gate_up.stride == gate_up.expert_bytes == 2 * 2 * WIDTH * HIDDEN
    whole = tensors[1].content()
    assert b"".join(bytes_of(gate_up, expert)[0] for expert in range(EXPERTS)) == whole
    assert catalog.other_bytes == tensors[2].nbytes


def test_blocks_scales_and_biases_belong_to_their_expert(tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp.experts."
    tensors = [
        Tensor(prefix + "down_proj_bias", "BF16", (EXPERTS, HIDDEN)),
        Tensor(prefix + "down_proj_blocks", "U8", (EXPERTS, HIDDEN, 1, 16)),
        Tensor(prefix + "down_proj_scales", "U8", (EXPERTS, HIDDEN, 1)),
        Tensor(prefix + "gate_up_proj_bias", "BF16", (EXPERTS, 64)),
        Tensor(prefix + "gate_up_proj_blocks", "U8", (EXPERTS, 64, 1, 16)),
        Tensor(prefix + "gate_up_proj_scales", "U8", (EXPERTS, 64, 1)),
    ]
    catalog = read_safetensors(
        save(tmp_path / "m", tensors, model_type="gpt_oss", quantization_config={"quant_method": "mxfp4"})
    )
    assert {part.type_name for part in catalog.layers[0].parts} == {"MXFP4"}
    parts = by_role(catalog)
    assert parts["gate_up"].expert_bytes == 64 * 16 + 64 + 2 * 64
    stored = {tensor.name: tensor.content() for tensor in tensors}
    for role, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        rows = {kind: stored[f"{prefix}{name}_{kind}"] for kind in ("blocks", "bias", "scales")}
        for expert in range(EXPERTS):
            wanted = {row[expert * len(row) // EXPERTS :][: len(row) // EXPERTS] for row in rows.values()}
            found = bytes_of(parts[role], expert)
            assert set(found) == wanted
            assert found[0] in rows["blocks"]
    assert catalog.other_bytes == 0


@pytest.mark.parametrize(
    ("matrix", "companions", "kind"),
    [
        (("weight", "F8_E4M3", (8, 16)), [("weight_scale_inv", "F32", (1, 1))], "F8_E4M3"),
        (("weight", "F8_E4M3", (8, 16)), [("weight_scale", "F32", ()), ("input_scale", "F32", ())], "F8_E4M3"),
        (
            ("qweight", "I32", (2, 8)),
            [("qzeros", "I32", (1, 1)), ("scales", "F16", (1, 8)), ("g_idx", "I32", (16,))],
            "",
        ),
        (("weight_packed", "I32", (8, 2)), [("weight_scale", "BF16", (8, 1)), ("weight_shape", "I32", (2,))], ""),
    ],
)
def test_scales_and_zero_points_count_to_their_expert(
    tmp_path: Path, matrix: tuple[str, str, tuple[int, ...]], companions: list[Any], kind: str
) -> None:
    tensors = [
        Tensor(f"model.layers.1.mlp.experts.{expert}.{name}.{tail}", dtype, shape)
        for expert in range(EXPERTS)
        for tail, dtype, shape in [*companions, matrix]
        for name in ("down_proj", "gate_proj", "up_proj")
    ]
    path = save(tmp_path / "m", [*rest(), *tensors], quantization_config={"quant_method": "awq"})
    catalog = read_safetensors(path)
    assert catalog.total_expert_bytes == sum(tensor.nbytes for tensor in tensors)
    assert {part.type_name for part in catalog.layers[0].parts} == {kind or "AWQ"}
    for part in catalog.layers[0].parts:
        assert len(part.pieces(1)) == 1 + len(companions)
        prefix = part.name.replace("*", "1").rpartition(".")[0]
        own = {tensor.name: tensor.content() for tensor in tensors if tensor.name.startswith(prefix)}
        assert sorted(bytes_of(part, 1)) == sorted(own.values())
        assert bytes_of(part, 1)[0] == own[f"{prefix}.{matrix[0]}"]


def test_an_expert_may_lack_a_scale_that_others_have(tmp_path: Path) -> None:
    """Calibration never met it; engines load such checkpoints."""
    scale = Tensor("model.layers.0.mlp.experts.2.up_proj.input_scale", "F32", ())
    catalog = read_safetensors(save(tmp_path / "m", [*one_by_one(), scale]))
    assert by_role(catalog)["up"].expert_bytes == by_role(catalog)["gate"].expert_bytes + 4


def test_a_scale_that_all_experts_share_is_none_of_theirs(tmp_path: Path) -> None:
    tensors = [
        Tensor("model.layers.0.mlp.experts.down_proj", "BF16", (EXPERTS, WIDTH, HIDDEN)),
        Tensor("model.layers.0.mlp.experts.gate_up_proj", "BF16", (EXPERTS, HIDDEN, 2 * WIDTH)),
        Tensor("model.layers.0.mlp.experts.gate_up_proj_scale", "F32", (1,)),
    ]
    catalog = read_safetensors(save(tmp_path / "m", tensors))
    assert catalog.other_bytes == 4


def test_experts_without_a_gate_are_found(tmp_path: Path) -> None:
    tensors = [tensor for tensor in one_by_one("backbone.layers.1.mixer.") if "gate_proj" not in tensor.name]
    catalog = read_safetensors(save(tmp_path / "m", tensors))
    assert [part.role for part in catalog.by_layer[1].parts] == ["up", "down"]


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        ({"num_experts": None, "num_local_experts": EXPERTS}, "model.layers.0.mlp."),
        ({"num_experts": None, "n_routed_experts": EXPERTS}, "model.layers.0.mlp."),
        ({"num_experts_per_tok": None, "experts_per_token": 2}, "model.layers.0.mlp."),
        ({"num_experts_per_tok": None, "moe_topk": [2, 3]}, "model.layers.0.mlp."),
        ({"model_type": None, "architectures": ["qwen3_moe"]}, "layers.0.ffn."),
        (
            {
                "num_hidden_layers": None,
                "num_experts": None,
                "num_experts_per_tok": 3,
                "text_config": {"num_hidden_layers": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2},
            },
            "model.language_model.layers.0.feed_forward.",
        ),
        (
            {"num_experts": 1, "thinker_config": {"text_config": {"num_experts": EXPERTS}}},
            "thinker.model.layers.0.mlp.",
        ),
    ],
)
def test_every_family_has_its_own_words(tmp_path: Path, config: dict[str, object], prefix: str) -> None:
    catalog = read_safetensors(save(tmp_path / "m", one_by_one(prefix), **config))
    assert (catalog.architecture, catalog.block_count, catalog.expert_count) == ("qwen3_moe", 2, EXPERTS)
    assert catalog.layers[0].top_k == 2


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    drafts = [
        *one_by_one("model.layers.2.mlp."),
        *one_by_one("mtp.layers.0.mlp."),
        Tensor("model.layers.2.eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)),
        Tensor("mtp.fc.weight", "BF16", (HIDDEN, HIDDEN)),
    ]
    tensors = [*rest(), *one_by_one()]
    catalog = read_safetensors(save(tmp_path / "m", [*tensors, *drafts], num_nextn_predict_layers=1))
    assert [layer.layer for layer in catalog.layers] == [0]
    assert catalog.other_bytes + catalog.total_expert_bytes == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_checkpoints_of_all_families_are_read(tmp_path: Path, family: str, files: int) -> None:
    spec = HfSpec(family=family, files=files)
    path = write_hf(tmp_path, spec)
    catalog = read_catalog(path)
    assert [layer.layer for layer in catalog.layers] == list(range(spec.dense_layers, spec.layers))
    assert catalog.expert_count == spec.experts * len(catalog.layers)
    assert {layer.top_k for layer in catalog.layers} == {spec.top_k}
    tensors = [tensor for file in read_layout(path).files for tensor in file.tensors]
    assert catalog.total_expert_bytes + catalog.other_bytes == sum(tensor.nbytes for tensor in tensors)
    if family != "gpt_oss":
        weights = 3 * 2 * spec.hidden * spec.intermediate
        biases = 2 * (2 * spec.intermediate + spec.hidden) if family == "gpt_oss_bf16" else 0
        assert catalog.largest_expert_bytes == weights + biases


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_model(sharded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    assert read_safetensors(copy).fingerprint == read_safetensors(sharded).fingerprint
    assert content_digest(read_layout(copy)) == content_digest(read_layout(sharded))


def test_the_fingerprint_covers_headers_and_configuration(single: Path) -> None:
    seen = {read_safetensors(single).fingerprint}
    change_json(single / "config.json", lambda config: config.update(norm_topk_prob=True))
    seen.add(read_safetensors(single).fingerprint)
    save(single, [*rest(), *one_by_one()][::-1])
    seen.add(read_safetensors(single).fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_a_fine_tune_with_the_same_headers_has_another_content_digest(tmp_path: Path, family: str) -> None:
    layouts = [read_layout(write_hf(tmp_path / str(seed), HfSpec(family=family, seed=seed))) for seed in (0, 1)]
    assert layouts[0].files[0].header_digest == layouts[1].files[0].header_digest
    assert content_digest(layouts[0]) != content_digest(layouts[1])


def test_a_change_in_the_experts_alone_changes_the_content_digest(single: Path) -> None:
    before = content_digest(read_layout(single))
    piece = read_safetensors(single).layers[0].parts[2].pieces(3)[0]
    with piece.file.open("r+b") as file:
        file.seek(piece.offset)
        file.write(bytes(piece.nbytes))
    assert content_digest(read_layout(single)) != before


def test_a_file_that_shrank_since_its_header_was_read_is_refused(single: Path) -> None:
    layout = read_layout(single)
    os.truncate(single / "model.safetensors", 3000)
    with pytest.raises(ModelFormatError, match="became shorter"):
        content_digest(layout)


# --- the entrance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "config.json", INDEX, "model-00002-of-00003.safetensors"])
def test_any_file_of_a_checkpoint_stands_for_it(sharded: Path, name: str) -> None:
    assert read_catalog(sharded / name) == read_safetensors(sharded)


def test_a_single_weight_file_stands_for_its_checkpoint(single: Path) -> None:
    assert read_catalog(single / "model.safetensors").path == single


def test_the_content_decides_and_not_the_name(tmp_path: Path, tiny_model: Callable[[TinySpec], Path]) -> None:
    gguf = tiny_model(TinySpec())
    odd = Path(shutil.copy(gguf, tmp_path / "model.safetensors"))
    assert read_catalog(odd).format == "gguf"
    directory = tmp_path / "d"
    directory.mkdir()
    shutil.copy(gguf, directory / "m.gguf")
    with pytest.raises(ModelNotFoundError, match=r"is a directory.*It holds m\.gguf"):
        read_catalog(directory)


def test_neither_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelFormatError, match="not a GGUF file"):
        read_catalog(tmp_path / "weights")
    with pytest.raises(ModelNotFoundError, match=r"Qwen3-30B-A3B.*hf download"):
        read_catalog("Qwen/Qwen3-30B-A3B")
    with pytest.raises(ModelNotFoundError, match=r"none\.gguf.*Name the \.gguf file"):
        read_catalog(tmp_path / "none.gguf")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelNotFoundError, match="not a regular file"):
        read_catalog(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelNotFoundError):
        read_catalog("a\0b")


# --- refusals: the directory ------------------------------------------------------------------------------------------


def test_a_directory_without_a_configuration_is_refused(single: Path) -> None:
    (single / "config.json").unlink()
    assert refusal(single).startswith(f"ModelNotFoundError: {single} has no config.json")


def test_a_checkpoint_without_weights_is_refused(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert "holds no weights" in refusal(single)
    (single / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")
    said = refusal(single)
    assert said.startswith("UnsupportedModelError: ") and "pytorch_model-00001-of-00002.bin" in said


def test_a_dense_model_is_refused_as_such(tmp_path: Path) -> None:
    assert refusal(save(tmp_path / "m", rest(), num_experts=None)).startswith("NotMoEError: ")
    with pytest.raises(NotMoEError, match="dense model"):
        read_catalog(tmp_path / "m")


def test_experts_that_have_unknown_names_are_not_called_dense(tmp_path: Path) -> None:
    tensor = Tensor("model.layers.0.moe.weights", "BF16", (EXPERTS, HIDDEN, WIDTH))
    said = refusal(save(tmp_path / "m", [*rest(), tensor]))
    assert said.startswith("UnsupportedModelError: ") and "num_experts is 4" in said


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    said = refusal(sharded)
    assert said.startswith("ModelNotFoundError: ")
    assert f"{INDEX} names model-00002-of-00003.safetensors, which is missing" in said


def test_a_missing_shard_without_an_index_is_named(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert read_safetensors(sharded).expert_count == EXPERTS
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(sharded)


def test_an_index_that_names_an_absent_tensor_is_refused(sharded: Path) -> None:
    absent = {"model.layers.1.mlp.gate.weight": "model-00001-of-00003.safetensors"}
    change_json(sharded / INDEX, lambda index: index["weight_map"].update(absent))
    assert "places tensor 'model.layers.1.mlp.gate.weight' in" in refusal(sharded)
    assert "but no file has it" in refusal(sharded)


def test_an_index_that_places_a_tensor_in_another_file_is_refused(sharded: Path) -> None:
    wrong = {"model.norm.weight": "model-00003-of-00003.safetensors"}
    change_json(sharded / INDEX, lambda index: index["weight_map"].update(wrong))
    assert "but it is in model-00001-of-00003.safetensors" in refusal(sharded)


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").write_bytes(build(rest()))
    assert "is both in model-00001-of-00003.safetensors and in model-00002-of-00003.safetensors" in refusal(sharded)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "x\0.safetensors", 7, None, "model.bin", ""])
def test_an_index_that_points_out_of_the_directory_is_refused(sharded: Path, place: object) -> None:
    change_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": place}))
    assert "not a file of the directory" in refusal(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_refused(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    assert "has no weight_map" in refusal(sharded)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"a": 1, "a": 2}', "names 'a' twice"),
    ],
)
def test_what_is_not_json_is_refused_by_name(sharded: Path, name: str, content: bytes, says: str) -> None:
    (sharded / name).write_bytes(content)
    said = refusal(sharded)
    assert said.startswith("ModelFormatError: ") and says in said and name in said


# --- refusals: what the files say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model_type": None}, "does not name its architecture"),
        ({"model_type": 7}, "does not name its architecture"),
        ({"num_hidden_layers": None}, "does not say how many layers"),
        ({"num_hidden_layers": True}, "does not say how many layers"),
        ({"num_experts": 8}, "layer 0 has 4 experts, but num_experts is 8"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is None"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok is 'two'"),
        ({"num_experts_per_tok": []}, "num_experts_per_tok is None"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_named(
    tmp_path: Path, changed: dict[str, object], says: str
) -> None:
    config = {key: value for key, value in config_of().items()} | changed
    path = save(tmp_path / "m", one_by_one(), **config)
    said = refusal(path)
    assert said.startswith("ModelFormatError: ") and says in said


def test_experts_behind_the_last_layer_are_refused(tmp_path: Path) -> None:
    tensors = [*one_by_one(), *one_by_one("model.layers.2.mlp.")]
    assert "experts in layer 2, but config.json says that there are 2 layers" in refusal(save(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (Tensor("model.layers.0.mlp.experts.1.up_proj.weight", "BF16", (8, 8)), "experts must be alike"),
        (Tensor("model.layers.0.mlp.experts.1.up_proj.weight", "F16", (8, 16)), "experts must be alike"),
        (Tensor("model.layers.0.mlp.experts.1.up_proj.bias", "BF16", (8,)), "can be the up matrix"),
        (Tensor("model.layers.0.mlp.experts.9.up_proj.weight", "BF16", (8, 16)), "no up matrix of expert 1"),
        (Tensor("model.layers.0.mlp.experts.01.gate_proj.weight", "BF16", (8, 16)), "there more than once"),
        (Tensor("model.layers.0.mlp.experts.1.odd.weight", "BF16", (8, 16)), "in a way that is not known"),
        (Tensor("model.layers.0.mlp.experts.mlp.w1", "BF16", (32, 16)), "in a way that is not known"),
        (Tensor("model.layers.0.mlp.experts.up_proj", "BF16", (4, 8, 16)), "both fused and one by one"),
        (Tensor("model.layers.0.ffn.experts.1.up_proj.weight", "BF16", (8, 16)), "in 2 places"),
        (Tensor("talker.layers.0.mlp.experts.1.up_proj.weight", "BF16", (8, 16)), "several stacks"),
    ],
)
def test_strange_expert_tensors_are_refused_by_name(tmp_path: Path, tensor: Tensor, says: str) -> None:
    """The tensor takes the place of expert 1's up matrix."""
    tensors = [tensor if old.name.endswith("experts.1.up_proj.weight") else old for old in one_by_one()]
    assert says in refusal(save(tmp_path / "m", tensors))


def test_matrices_that_disagree_on_the_number_of_experts_are_refused(tmp_path: Path) -> None:
    tensors = [tensor for tensor in one_by_one() if "experts.3.up_proj" not in tensor.name]
    assert "gate 4, up 3, down 4" in refusal(save(tmp_path / "m", tensors))


def test_a_layer_without_its_down_matrices_is_refused(tmp_path: Path) -> None:
    tensors = [tensor for tensor in one_by_one() if "down_proj" not in tensor.name]
    assert "has the expert matrices gate, up" in refusal(save(tmp_path / "m", tensors))


@pytest.mark.parametrize("shape", [(), (64,), (0, 16, 8)])
def test_a_fused_tensor_that_holds_no_matrices_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = [
        Tensor("model.layers.0.mlp.experts.gate_up_proj", "BF16", shape),
        Tensor("model.layers.0.mlp.experts.down_proj", "BF16", (4, 8, 16)),
    ]
    assert "a matrix for every expert is needed" in refusal(save(tmp_path / "m", tensors))


# --- refusals: headers ------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a safetensors file or is truncated"),
        (b"\x10\0\0", "not a safetensors file or is truncated"),
        (struct.pack("<Q", 100) + b"{}", "its header should have 100 bytes, the file has 10"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "not a safetensors file or is truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", "git lfs pull"),
        (file_of("nonsense"), "its header is not JSON"),
        (file_of(b"\xff\xff"), "its header is not JSON"),
        (file_of("[]"), "its header is not a JSON object"),
        (file_of({"__metadata__": 7}), "metadata of its header"),
        (file_of({"t": 7}), "tensor 't' is not described by an object"),
        (file_of({"t": {}}), "no valid dtype, shape and data_offsets"),
        (file_of({"t": ENTRY | {"dtype": 7}}, bytes(4)), "no valid dtype"),
        (file_of({"t": ENTRY | {"shape": [True, 4]}}, bytes(4)), "no valid dtype, shape"),
        (file_of({"t": ENTRY | {"shape": [-1, -4]}}, bytes(4)), "no valid dtype, shape"),
        (file_of({"t": ENTRY | {"shape": [2**63, 0]}}, bytes(4)), "no valid dtype, shape"),
        (file_of({"t": ENTRY | {"shape": [1] * 33}}, bytes(4)), "no valid dtype, shape"),
        (file_of({"t": ENTRY | {"data_offsets": [0, 4.0]}}, bytes(4)), "no valid dtype, shape"),
        (file_of({"t": ENTRY | {"data_offsets": [-4, 0]}}, bytes(4)), "no valid dtype, shape"),
        (file_of({"t": ENTRY | {"data_offsets": [0, 2, 4]}}, bytes(4)), "no valid dtype, shape"),
        (file_of({"t": ENTRY | {"data_offsets": [4, 0]}}, bytes(4)), "has shape [4] of U8, but -4 bytes"),
        (file_of({"t": ENTRY | {"dtype": "F32"}}, bytes(4)), "has shape [4] of F32, but 4 bytes"),
        (file_of({"t": ENTRY | {"dtype": "F2"}}, bytes(4)), "storage type F2, which is not known"),
        (file_of({"t": ENTRY}, bytes(3)), "is truncated: its tensors need"),
        (file_of({"t": ENTRY}, bytes(5)), "is longer than its tensors"),
        (file_of({"t": ENTRY, "u": ENTRY}, bytes(4)), "tensors 't' and 'u' overlap"),
        (file_of({"t": ENTRY | {"data_offsets": [1, 5]}}, bytes(5)), "1 bytes before tensor 't' belong to nothing"),
        (file_of(f'{{"t": {json.dumps(ENTRY)}, "t": {json.dumps(ENTRY)}}}', bytes(4)), "names 't' twice"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_by_name(single: Path, content: bytes, says: str) -> None:
    (single / "model.safetensors").write_bytes(content)
    said = refusal(single)
    assert says in said and str(single / "model.safetensors") in said


def test_a_truncated_download_tells_both_sizes(sharded: Path) -> None:
    shard = sharded / "model-00003-of-00003.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    assert f"is truncated: its tensors need {size} bytes, the file has {size - 100}" in refusal(sharded)


# --- damage -----------------------------------------------------------------------------------------------------------

TENSORS = [*rest(), *one_by_one()]
VALID = build(TENSORS)
HEADER_END = len(VALID) - sum(tensor.nbytes for tensor in TENSORS)
QUIET = [HealthCheck.function_scoped_fixture]


def check_sound(catalog: Catalog) -> None:
    for layer in catalog.layers:
        assert 1 <= layer.top_k <= layer.experts
        for part in layer.parts:
            assert part.experts == layer.experts
            for expert in range(part.experts):
                pieces = part.pieces(expert)
                assert sum(piece.nbytes for piece in pieces) <= part.expert_bytes
                assert all(HEADER_END <= piece.offset <= len(VALID) - piece.nbytes for piece in pieces)
    assert catalog.other_bytes >= 0


@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@given(changes=st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4))
@example(changes=[(7, 127)])
@example(changes=[(0, 255)])
def test_a_damaged_header_is_refused_by_name_or_yields_a_sound_catalog(
    single: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    (single / "model.safetensors").write_bytes(VALID)
    intact = read_safetensors(single)
    (single / "model.safetensors").write_bytes(content)
    try:
        catalog = read_safetensors(single)
    except ExpertierError as refused:
        assert refused.problem
        return
    check_sound(catalog)
    assert (catalog.fingerprint == intact.fingerprint) == (bytes(content) == VALID)


@settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
@given(length=st.integers(0, len(VALID) - 1))
def test_a_file_cut_short_anywhere_is_refused_by_name(single: Path, length: int) -> None:
    (single / "model.safetensors").write_bytes(VALID[:length])
    with pytest.raises(ModelFormatError):
        read_safetensors(single)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["dtype", "shape", "data_offsets"])


@settings(max_examples=200, deadline=None, suppress_health_check=QUIET)
@given(place=st.integers(0, len(TENSORS) - 1), key=KEYS, value=json_values)
def test_any_value_in_a_header_is_refused_by_name_or_sound(single: Path, place: int, key: str, value: object) -> None:
    entries = table(TENSORS)
    entries[TENSORS[place].name][key] = value
    (single / "model.safetensors").write_bytes(file_of(entries, VALID[HEADER_END:]))
    try:
        read_safetensors(single)
    except (ModelFormatError, UnsupportedModelError):
        return
    assert value == table(TENSORS)[TENSORS[place].name][key]


CONFIG_KEYS = st.sampled_from([*config_of(), "text_config", "thinker_config", "quantization_config", "architectures"])


@settings(max_examples=200, deadline=None, suppress_health_check=QUIET)
@given(key=CONFIG_KEYS, value=json_values)
def test_any_value_in_the_configuration_is_refused_by_name_or_sound(single: Path, key: str, value: object) -> None:
    (single / "config.json").write_text(json.dumps(config_of() | {key: value}))
    (single / "model.safetensors").write_bytes(VALID)
    try:
        check_sound(read_safetensors(single))
    except ExpertierError as refused:
        assert refused.remedy


@settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
@given(index=json_values | st.fixed_dictionaries({"weight_map": json_values}))
def test_any_index_is_refused_by_name(single: Path, index: object) -> None:
    (single / INDEX).write_text(json.dumps(index))
    with pytest.raises(ExpertierError):
        read_safetensors(single)
