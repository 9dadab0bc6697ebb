from __future__ import annotations

import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expertier.catalog.gguf import (
    build_catalog,
    content_digest,
    read_gguf,
    read_layout,
    read_tensor,
)
from expertier.catalog.gguf_header import TENSOR_TYPES
from expertier.catalog.types import Catalog
from expertier.errors import (
    ExpertierError,
    ModelFormatError,
    ModelNotFoundError,
    NotMoEError,
    UnsupportedModelError,
)
from support.raw_gguf import (
    BOOL,
    F32,
    I32,
    STRING,
    TYPE_BF16,
    TYPE_F16,
    TYPE_F32,
    TYPE_MXFP4,
    TYPE_Q4_K,
    TYPE_Q8_0,
    U16,
    U32,
    Tensor,
    Value,
    build,
    moe_keys,
    moe_tensors,
    split,
    tensor_row,
)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_split(directory: Path, parts: int, *, name: str = "m", alignment: int = 32, **shape: int) -> Path:
    files = split(moe_keys(), moe_tensors(**shape), parts, alignment=alignment)
    for number, content in enumerate(files, 1):
        write(directory / f"{name}-{number:05}-of-{parts:05}.gguf", content)
    return directory / f"{name}-00001-of-{parts:05}.gguf"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf", build(moe_keys(), moe_tensors()))


def without_place(catalog: Catalog) -> list[object]:
    return [
        (layer.layer, layer.experts, layer.top_k, [replace(part, file=Path(), offset=0) for part in layer.parts])
        for layer in catalog.layers
    ]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_parts_come_in_execution_order_and_only_routed_weights_are_parts(single: Path) -> None:
    catalog = read_gguf(single)
    assert [part.name for part in catalog.by_layer[1].parts] == [
        "blk.1.ffn_gate_exps.weight",
        "blk.1.ffn_up_exps.weight",
        "blk.1.ffn_down_exps.weight",
    ]
    assert catalog.architecture == "qwen3moe"
    assert (catalog.block_count, catalog.expert_count, catalog.by_layer[0].top_k) == (2, 8, 2)


def test_every_expert_lies_where_the_catalog_says(single: Path) -> None:
    content = {tensor.name: tensor.content() for tensor in moe_tensors()}
    raw = single.read_bytes()
    for layer in read_gguf(single).layers:
        for part in layer.parts:
            for expert in range(part.experts):
                start = part.offset + expert * part.expert_bytes
                wanted = content[part.name][expert * part.expert_bytes :][: part.expert_bytes]
                assert raw[start : start + part.expert_bytes] == wanted


def test_dense_layers_are_left_out_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", build(moe_keys(layers=3), moe_tensors(layers=3, dense=1)))
    catalog = read_gguf(path)
    assert [layer.layer for layer in catalog.layers] == [1, 2]
    assert catalog.block_count == 3


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    whole = read_gguf(write(tmp_path / "whole.gguf", build(moe_keys(layers=3), moe_tensors(layers=3))))
    keys = {**moe_keys(layers=3), "qwen3moe.nextn_predict_layers": Value(U32, 1)}
    catalog = read_gguf(write(tmp_path / "m.gguf", build(keys, moe_tensors(layers=3))))
    assert [layer.layer for layer in catalog.layers] == [0, 1]
    assert catalog.block_count == 2
    assert catalog.other_bytes == whole.other_bytes
    assert set(catalog.idle_experts) == {part.name for part in whole.layers[2].parts}
    keys["qwen3moe.nextn_predict_layers"] = Value(U32, 7)
    with pytest.raises(NotMoEError):
        read_gguf(write(tmp_path / "m.gguf", build(keys, moe_tensors(layers=3))))


def test_sizes_add_up(single: Path) -> None:
    catalog = read_gguf(single)
    tensor_bytes = sum(tensor.nbytes for tensor in moe_tensors())
    assert catalog.total_expert_bytes + catalog.other_bytes == tensor_bytes
    assert catalog.total_expert_bytes == 2 * 3 * 4 * 32 * 8 * 2
    assert catalog.file_bytes == single.stat().st_size


@pytest.mark.parametrize("version", [2, 3])
def test_both_current_versions_are_read(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "m.gguf", build(moe_keys(), moe_tensors(), version=version))
    assert read_layout(path)[0].version == version
    assert read_gguf(path).expert_count == 8


def test_fused_gate_and_up_come_before_down(tmp_path: Path) -> None:
    tensors = [
        Tensor("blk.0.ffn_down_exps.weight", TYPE_F16, (8, 32, 4)),
        Tensor("blk.0.ffn_gate_up_exps.weight", TYPE_Q8_0, (32, 16, 4)),
    ]
    catalog = read_gguf(write(tmp_path / "m.gguf", build(moe_keys(layers=1), tensors)))
    assert [part.role for part in catalog.layers[0].parts] == ["gate_up", "down"]
    assert [part.type_name for part in catalog.layers[0].parts] == ["Q8_0", "F16"]


def test_experts_without_a_gate_matrix_are_read(tmp_path: Path) -> None:
    tensors = [tensor for tensor in moe_tensors(layers=1) if "ffn_gate_exps" not in tensor.name]
    catalog = read_gguf(write(tmp_path / "m.gguf", build(moe_keys(layers=1), tensors)))
    assert [part.role for part in catalog.layers[0].parts] == ["up", "down"]


def test_top_k_may_be_given_per_layer(tmp_path: Path) -> None:
    catalog = read_gguf(write(tmp_path / "m.gguf", build(moe_keys(top_k=[1, 3]), moe_tensors())))
    assert [layer.top_k for layer in catalog.layers] == [1, 3]


def test_a_stated_alignment_moves_the_data(tmp_path: Path) -> None:
    keys = moe_keys() | {"general.alignment": Value(U32, 4096)}
    path = write(tmp_path / "m.gguf", build(keys, moe_tensors(), alignment=4096))
    layout = read_layout(path)[0]
    assert layout.alignment == 4096
    assert all(tensor.offset % 4096 == 0 for tensor in layout.tensors)
    assert without_place(read_gguf(path)) == without_place(
        read_gguf(write(tmp_path / "n.gguf", build(moe_keys(), moe_tensors())))
    )


def test_the_type_table_agrees_with_the_gguf_package() -> None:
    for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if kind.name == "Q8_1":  # a type of activations, never in a file; the package still has an old size of it
            continue
        assert TENSOR_TYPES[kind.value] == (kind.name, block, nbytes)


def test_the_layout_agrees_with_the_reader_of_the_gguf_package(single: Path) -> None:
    layout = read_layout(single)[0]
    reference = gguf.GGUFReader(single)
    assert layout.data_offset == reference.data_offset
    assert [(t.name, t.offset, t.nbytes, t.shape) for t in layout.tensors] == [
        (t.name, t.data_offset, t.n_bytes, tuple(int(n) for n in t.shape)) for t in reference.tensors
    ]
    pairs = [name for name in reference.fields if not name.startswith("GGUF.")]
    assert [key.name for key in layout.keys] == pairs
    assert layout.metadata["qwen3moe.rope.freq_base"] == 10000.0
    assert "tokenizer.ggml.tokens" not in layout.metadata


def test_nothing_stays_open_or_mapped(single: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    layouts = read_layout(single)
    read_tensor(layouts, "blk.0.attn_norm.weight")
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(single) not in Path("/proc/self/maps").read_text()


def test_a_header_larger_than_the_first_read_is_stepped_over(tmp_path: Path) -> None:
    keys = moe_keys(vocabulary=200_000)
    layout = read_layout(write(tmp_path / "m.gguf", build(keys, moe_tensors())))[0]
    assert layout.data_offset > 3 << 20
    assert len(build_catalog([layout]).layers) == 2


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_a_copy_at_another_time_and_place_has_the_same_fingerprint(single: Path, tmp_path: Path) -> None:
    copy = shutil.copy(single, tmp_path / "copy.gguf")
    os.utime(copy, (1, 1))
    assert read_gguf(copy).fingerprint == read_gguf(single).fingerprint


def test_another_vocabulary_or_shape_or_size_changes_the_fingerprint(tmp_path: Path) -> None:
    contents = [
        build(moe_keys(), moe_tensors()),
        build(moe_keys() | {"general.name": Value(STRING, "war")}, moe_tensors()),
        build(moe_keys(), moe_tensors(rows=16)),
        build(moe_keys(), moe_tensors()) + bytes(32),
    ]
    prints = {read_gguf(write(tmp_path / f"{i}.gguf", content)).fingerprint for i, content in enumerate(contents)}
    assert len(prints) == len(contents)


def test_models_with_equal_headers_are_told_apart_by_a_sample_of_their_content(single: Path, tmp_path: Path) -> None:
    tensors = [replace(t, data=bytes(t.nbytes)) if "up_exps" in t.name else t for t in moe_tensors()]
    other = write(tmp_path / "other.gguf", build(moe_keys(), tensors))
    assert read_gguf(other).fingerprint == read_gguf(single).fingerprint
    assert content_digest(read_layout(other)) != content_digest(read_layout(single))
    assert content_digest(read_layout(single)) == content_digest(read_layout(single))


# --- split models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_split_model_has_the_same_experts_as_the_single_file(single: Path, tmp_path: Path, parts: int) -> None:
    catalog = read_gguf(write_split(tmp_path, parts))
    reference = read_gguf(single)
    assert without_place(catalog) == without_place(reference)
    assert catalog.other_bytes == reference.other_bytes
    assert len(catalog.files) == parts
    assert catalog.path == catalog.files[0]
    content = {tensor.name: tensor.content() for tensor in moe_tensors()}
    for layer in catalog.layers:
        for part in layer.parts:
            raw = part.file.read_bytes()[part.offset : part.offset + part.experts * part.expert_bytes]
            assert raw == content[part.name]


def test_a_first_file_without_tensors_is_read(tmp_path: Path) -> None:
    keys, tensors = moe_keys(), moe_tensors()
    count = {"split.count": Value(U16, 2), "split.tensors.count": Value(I32, len(tensors))}
    first = write(tmp_path / "m-00001-of-00002.gguf", build(keys | {"split.no": Value(U16, 0)} | count, []))
    write(tmp_path / "m-00002-of-00002.gguf", build({"split.no": Value(U16, 1)} | count, tensors))
    assert read_gguf(first).expert_count == 8


def test_a_missing_file_of_a_split_model_is_named(tmp_path: Path) -> None:
    first = write_split(tmp_path, 3)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelNotFoundError, match=r"file 2 is missing.*m-00002-of-00003\.gguf"):
        read_gguf(first)


def test_naming_a_later_file_of_a_split_model_tells_which_to_name(tmp_path: Path) -> None:
    write_split(tmp_path, 3)
    with pytest.raises(ModelFormatError, match=r"file 2 of 3.*m-00001-of-00003\.gguf"):
        read_gguf(tmp_path / "m-00002-of-00003.gguf")


def test_a_renamed_first_file_of_a_split_model_is_refused_with_the_name_it_needs(tmp_path: Path) -> None:
    renamed = write_split(tmp_path, 3).rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFormatError, match="-00001-of-00003"):
        read_gguf(renamed)


def test_files_of_different_models_in_one_split_are_refused(tmp_path: Path) -> None:
    first = write_split(tmp_path, 3)
    shutil.copy(tmp_path / "m-00003-of-00003.gguf", tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(ModelFormatError, match=r"m-00002-of-00003\.gguf should have split\.no 1"):
        read_gguf(first)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    first = write_split(tmp_path, 2)
    own = {"split.no": Value(U16, 1), "split.count": Value(U16, 2)}
    write(tmp_path / "m-00002-of-00002.gguf", build(own, moe_tensors()[:1]))
    with pytest.raises(ModelFormatError, match=r"'token_embd\.weight' is both in"):
        read_gguf(first)


def test_a_wrong_number_of_tensors_over_all_files_is_refused(tmp_path: Path) -> None:
    first = write_split(tmp_path, 2)
    own = {"split.no": Value(U16, 1), "split.count": Value(U16, 2)}
    write(tmp_path / "m-00002-of-00002.gguf", build(own, []))
    with pytest.raises(ModelFormatError, match="the first one says"):
        read_gguf(first)


# --- single tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType(i) for i in (TYPE_F32, TYPE_F16, TYPE_BF16, TYPE_Q8_0, TYPE_MXFP4)]
)
def test_a_tensor_is_decoded_to_float32_in_numpy_order(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    router = np.linspace(-2, 2, 4 * 32, dtype=np.float32).reshape(4, 32)
    stored = gguf.quants.quantize(router, kind)
    tensors = [*moe_tensors(), Tensor("blk.0.router.weight", kind.value, (32, 4), stored.tobytes())]
    layouts = read_layout(write(tmp_path / "m.gguf", build(moe_keys(), tensors)))
    decoded = read_tensor(layouts[0], "blk.0.router.weight")
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, gguf.quants.dequantize(stored, kind))


def test_a_tensor_is_found_in_whichever_file_holds_it(tmp_path: Path) -> None:
    layouts = read_layout(write_split(tmp_path, 3))
    assert read_tensor(layouts, "blk.1.ffn_gate_inp.weight").shape == (4, 32)


def test_a_tensor_that_is_not_there_is_named(single: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"no tensor 'blk\.7\.ffn_gate_inp\.weight'"):
        read_tensor(read_layout(single), "blk.7.ffn_gate_inp.weight")


def test_a_tensor_type_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    tensors = [*moe_tensors(), Tensor("odd.weight", 15, (256,))]
    layouts = read_layout(write(tmp_path / "m.gguf", build(moe_keys(), tensors)))
    with pytest.raises(UnsupportedModelError, match="Q8_K cannot be decoded"):
        read_tensor(layouts, "odd.weight")


def test_a_file_that_shrank_since_its_header_was_read_is_refused(single: Path) -> None:
    layouts = read_layout(single)
    os.truncate(single, layouts[0].data_offset)
    with pytest.raises(ModelFormatError, match="became shorter"):
        read_tensor(layouts, "token_embd.weight")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"There is no model file .*none\.gguf\. Name the \.gguf file"):
        read_gguf(tmp_path / "none.gguf")


def test_a_directory_is_refused_and_the_models_in_it_are_named(single: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"is a directory.*It holds m\.gguf"):
        read_gguf(single.parent)


def test_a_checkpoint_in_place_of_a_gguf_file_is_refused_with_the_engine_that_takes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"is a directory.*--engine vllm"):
        read_gguf(tmp_path)


def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelNotFoundError, match="not a regular file"):
        read_gguf(tmp_path / "pipe.gguf")


def test_a_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="cannot be opened"):
        read_gguf("a\0b.gguf")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "starts with ''"),
        (b"GG", "starts with 'GG'"),
        (b"PK\x03\x04" + bytes(100), "starts with '50 4b 03 04'"),
        (b"ggml" + bytes(100), "not a GGUF file: it starts with 'ggml'"),
        (b"GGUF", "in the middle of its version"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(50), "GGUF version 1"),
        (b"GGUF" + struct.pack("<I", 0) + bytes(50), "GGUF version 0"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(50), "GGUF version 4"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(50), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(50), "claims 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(50), "claims 9223372036854775808 keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + bytes(50), "the name of key 0 is 0 characters long"),
    ],
)
def test_what_is_not_a_current_gguf_file_is_refused_by_name(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ModelFormatError) as refusal:
        read_gguf(write(tmp_path / "m.gguf", content))
    assert says in str(refusal.value)
    assert str(tmp_path / "m.gguf") in str(refusal.value)
    assert refusal.value.remedy


def refused(tmp_path: Path, keys: dict[str, Value], tensors: list[Tensor]) -> str:
    with pytest.raises(ExpertierError) as refusal:
        read_gguf(write(tmp_path / "m.gguf", build(keys, tensors)))
    return f"{type(refusal.value).__name__}: {refusal.value}"


def test_a_truncated_download_tells_both_sizes(single: Path) -> None:
    size = single.stat().st_size
    os.truncate(single, size - 1000)
    with pytest.raises(
        ModelFormatError, match=rf"truncated: its tensors need {size} bytes, the file has {size - 1000}"
    ):
        read_gguf(single)


def test_a_dense_model_is_refused_as_such(tmp_path: Path) -> None:
    assert refused(tmp_path, moe_keys(), moe_tensors(dense=2)).startswith("NotMoEError: ")


def test_experts_stored_one_by_one_are_refused_with_the_way_out(tmp_path: Path) -> None:
    tensors = [Tensor("blk.0.ffn_gate.3.weight", TYPE_F16, (32, 8))]
    said = refused(tmp_path, moe_keys(), tensors)
    assert said.startswith("UnsupportedModelError: ")
    assert "Convert the model again" in said


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"qwen3moe.expert_used_count": Value(U32, 0)}, "expert_used_count is 0"),
        ({"qwen3moe.expert_used_count": Value(U32, 5)}, "has 4 experts, but qwen3moe.expert_used_count is 5"),
        ({"qwen3moe.expert_used_count": Value(U32, [2])}, "has 1 values, none for layer 1"),
        ({"qwen3moe.expert_used_count": Value(STRING, "two")}, "'two', a whole number is needed"),
        ({"qwen3moe.expert_used_count": Value(F32, 2.0)}, "2.0, a whole number is needed"),
        ({"qwen3moe.block_count": Value(U32, 1)}, "experts in layer 1, but qwen3moe.block_count is 1"),
        ({"qwen3moe.block_count": Value(BOOL, True)}, "True, a whole number is needed"),
        ({"qwen3moe.expert_count": Value(U32, 8)}, "disagree on the number of experts"),
        ({"general.architecture": Value(U32, 7)}, "does not name its architecture"),
        ({"general.architecture": Value(STRING, "mixtral")}, "mixtral.block_count is 0"),
        ({"general.alignment": Value(U32, 48)}, "general.alignment is 48"),
        ({"general.alignment": Value(U32, 0)}, "general.alignment is 0"),
        ({"general.alignment": Value(U32, 2**31)}, "general.alignment is 2147483648"),
    ],
)
def test_keys_that_contradict_the_tensors_are_named(tmp_path: Path, changed: dict[str, Value], says: str) -> None:
    assert says in refused(tmp_path, moe_keys() | changed, moe_tensors())


def test_a_missing_top_k_is_named(tmp_path: Path) -> None:
    keys = moe_keys()
    del keys["qwen3moe.expert_used_count"]
    assert "expert_used_count is None" in refused(tmp_path, keys, moe_tensors())


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (Tensor("blk.0.ffn_up_exps.weight", TYPE_F16, (32, 8, 3)), "gate 4, up 3, down 4"),
        (Tensor("blk.0.ffn_up_exps.weight", 26, (32, 8, 4)), "has type I32, in which no weights are stored"),
        (Tensor("blk.0.ffn_up_exps.weight", TYPE_F16, (32, 8, 4, 1)), "shape (32, 8, 4, 1)"),
        (Tensor("blk.0.ffn_up_exps.weight", TYPE_F16, (32, 8, 0)), "shape (32, 8, 0)"),
        (Tensor("blk.0.ffn_gate_up_exps.weight", TYPE_F16, (32, 8, 4)), "expert tensors down, gate, gate_up"),
        (Tensor("blk.1.ffn_up_exps.weight", TYPE_F16, (32, 8, 4)), "'blk.1.ffn_up_exps.weight' occurs twice"),
        (Tensor("blk.01.ffn_up_exps.weight", TYPE_F16, (32, 8, 4)), "more than one ffn_up_exps tensor in layer 1"),
        (Tensor("blk.0.ffn_up_exps.weight", TYPE_Q4_K, (32, 8, 4)), "not a multiple of 256 as Q4_K needs"),
    ],
)
def test_strange_expert_tensors_are_refused_by_name(tmp_path: Path, tensor: Tensor, says: str) -> None:
    tensors = [tensor if old.name == "blk.0.ffn_up_exps.weight" else old for old in moe_tensors()]
    assert says in refused(tmp_path, moe_keys(), tensors)


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


EMBEDDING = ("token_embd.weight", TYPE_F32, (32, 50))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (("token_embd.weight", TYPE_F32, (32, 50), 16), "starts at 16, not a multiple of 32"),
        (("token_embd.weight", TYPE_F32, (32, 50), 32), "overlap"),
        (("token_embd.weight", TYPE_F32, (32, 2**62), 0), "overlap"),
        (("token_embd.weight", TYPE_F32, (32, 50), 2**63), "is truncated: its tensors need"),
        (("token_embd.weight", 1000, (32, 50), 0), "storage type 1000"),
        (("token_embd.weight", 4, (32, 50), 0), "storage type 4"),
    ],
)
def test_a_tensor_table_that_makes_no_sense_is_refused(
    tmp_path: Path, row: tuple[str, int, tuple[int, ...], int], says: str
) -> None:
    content = patched(build(moe_keys(), moe_tensors()), tensor_row(*EMBEDDING, 0), tensor_row(*row))
    with pytest.raises(ExpertierError) as refusal:
        read_gguf(write(tmp_path / "m.gguf", content))
    assert says in str(refusal.value)


def test_an_absurd_string_length_is_refused(tmp_path: Path) -> None:
    content = build(moe_keys(), moe_tensors())
    first_token = struct.pack("<Q", 6) + b"token0"
    content = patched(content, first_token, struct.pack("<Q", 2**62) + b"token0")
    with pytest.raises(ModelFormatError, match=r"in the middle of the value of key 'tokenizer\.ggml\.tokens'"):
        read_gguf(write(tmp_path / "m.gguf", content))


def test_a_header_that_never_ends_is_given_up(tmp_path: Path) -> None:
    """A preallocated download: the header claims a huge vocabulary and the rest of the file is one big hole."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    start += struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, STRING, 2**30) + struct.pack("<Q", 2**33)
    path = write(tmp_path / "m.gguf", start)
    os.truncate(path, 2**34)
    with pytest.raises(ModelFormatError, match="makes the header larger than 512 MiB"):
        read_gguf(path)


# --- damage -----------------------------------------------------------------------------------------------------------

VALID = build(moe_keys(), moe_tensors())
HEADER_END = len(VALID) - sum(t.nbytes + -t.nbytes % 32 for t in moe_tensors())


def check_sound(catalog: Catalog, size: int) -> None:
    for layer in catalog.layers:
        assert 1 <= layer.top_k <= layer.experts
        for part in layer.parts:
            assert part.experts == layer.experts
            assert part.offset >= 0 and part.offset + part.experts * part.expert_bytes <= size
    assert catalog.other_bytes >= 0


damage = st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=damage)
@example(changes=[(15, 255)])
@example(changes=[(23, 127)])
def test_a_damaged_header_is_refused_by_name_or_yields_a_sound_catalog(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    try:
        catalog = read_gguf(write(tmp_path / "m.gguf", bytes(content)))
    except ExpertierError as refusal:
        assert refusal.problem
        return
    check_sound(catalog, len(VALID))
    intact = read_gguf(write(tmp_path / "v.gguf", VALID))
    assert (catalog.fingerprint == intact.fingerprint) == (bytes(content) == VALID)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(VALID) - 1))
def test_a_file_cut_short_anywhere_is_refused_by_name(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelFormatError):
        read_gguf(write(tmp_path / "m.gguf", VALID[:length]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=300))
def test_noise_after_a_valid_start_is_refused_by_name(tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(ExpertierError):
        read_gguf(write(tmp_path / "m.gguf", b"GGUF\x03\0\0\0" + tail))
