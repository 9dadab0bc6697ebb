"""Experts run repacked exactly where default llama.cpp repacks them, from a file that is written once."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import random
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expertier.catalog import pack as pack_module
from expertier.catalog.gguf import read_gguf, read_layout
from expertier.catalog.gguf_header import TENSOR_TYPES
from expertier.catalog.pack import Pack
from expertier.catalog.types import ExpertPart
from expertier.config import OffloadOptions
from expertier.errors import ExpertLoadError, SidecarError
from expertier_llamacpp import ggml, sidecar
from expertier_llamacpp.buffer import ExpertBuffers
from expertier_llamacpp.sidecar import Repacker, choose_kernels
from llamacpp.engines import closing, expertier, stock_trace, stock_twin, trace
from support.tiny_gguf import TinySpec

pytestmark = pytest.mark.engine

TinyModel = Callable[[TinySpec], Path]

PACKED = "kernels repacked (sidecar)"
Q4_K = TinySpec(experts=16, expert_type="Q4_K", other_type="Q8_0")


def repackable(*type_names: str) -> Any:
    """Skip where this CPU has no repacked kernels for these types."""
    missing = [name for name in type_names if not Repacker().wants(expert_part(name), 2)]
    return pytest.mark.skipif(bool(missing), reason=f"llama.cpp does not repack {', '.join(missing)} on this CPU")


def expert_part(type_name: str, columns: int = 256, rows: int = 256, experts: int = 4) -> ExpertPart:
    _, block, nbytes = next(entry for entry in TENSOR_TYPES.values() if entry[0] == type_name)
    return ExpertPart(
        name="blk.0.ffn_up_exps.weight",
        layer=0,
        role="up",
        file=Path("m.gguf"),
        offset=0,
        expert_bytes=columns // block * nbytes * rows,
        experts=experts,
        type_name=type_name,
        shape=(columns, rows, experts),
    )


needs_q4_k = repackable("Q4_K")


def options(directory: Path, repack: str = "auto") -> OffloadOptions:
    return OffloadOptions.from_mapping({"repack": repack, "sidecar_dir": str(directory), "io_mode": "buffered"})


def kernels_of(path: Path, directory: Path, repack: str = "auto") -> sidecar.Kernels:
    return choose_kernels(read_gguf(path), read_layout(path), options(directory, repack))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---- what llama.cpp would do


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_unquantised_experts_are_never_repacked(type_name: str) -> None:
    assert not Repacker().wants(expert_part(type_name), 2)


@needs_q4_k
def test_a_matrix_whose_rows_do_not_fill_the_interleave_is_not_repacked() -> None:
    repacker = Repacker()
    assert repacker.wants(expert_part("Q4_K", rows=64), 2)
    assert not repacker.wants(expert_part("Q4_K", rows=63), 2)
    with pytest.raises(SidecarError, match="no repacked form for 63 rows"):
        repacker.repack("Q4_K", (256, 63), 0, 0)


@needs_q4_k
def test_a_layer_of_one_expert_is_a_matrix_to_llama_cpp_and_not_repacked() -> None:
    assert not Repacker().wants(expert_part("Q4_K", experts=1), 1)


@needs_q4_k
def test_experts_repacked_one_by_one_are_the_tensor_repacked_at_once() -> None:
    part = expert_part("Q4_K", columns=512, rows=24, experts=5)
    plain = random.Random(0).randbytes(part.expert_bytes * part.experts)
    source = ctypes.create_string_buffer(plain, len(plain))
    whole, single = (ctypes.create_string_buffer(len(plain)) for _ in range(2))
    repacker = Repacker()
    repacker.repack("Q4_K", (512, 24 * 5), ctypes.addressof(source), ctypes.addressof(whole))
    for expert in range(part.experts):
        start = expert * part.expert_bytes
        repacker.repack("Q4_K", (512, 24), ctypes.addressof(source) + start, ctypes.addressof(single) + start)
    assert single.raw == whole.raw != plain


@needs_q4_k
def test_the_layout_key_depends_on_how_bytes_are_arranged_and_on_nothing_else() -> None:
    repacker, other = Repacker(), Repacker()
    first = repacker.layout([expert_part("Q4_K")])
    assert first == other.layout([expert_part("Q4_K"), expert_part("Q4_K", columns=512)])
    assert first != repacker.layout([expert_part("Q4_K", rows=64)])

    def plainly(_type: str, _shape: tuple[int, int], source: int, target: int) -> None:
        ctypes.memmove(target, source, 100)

    other.repack = plainly  # type: ignore[method-assign]
    assert first != other.layout([expert_part("Q4_K")])


def test_repacking_says_nothing_and_leaves_the_log_as_it_was(
    tiny_model: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def log_function() -> int | None:
        function, data = ctypes.c_void_p(), ctypes.c_void_p()
        ggml.base().ggml_log_get(ctypes.byref(function), ctypes.byref(data))
        return function.value

    before = log_function()
    kernels_of(tiny_model(Q4_K), tmp_path)
    assert log_function() == before
    assert "repack tensor" not in capfd.readouterr().err


def test_the_patterns_send_every_tensor_where_it_belongs() -> None:
    placements: dict[str, Any] = {
        f"blk.{layer}.ffn_{role}_exps.weight": None for layer in range(12) for role in ("gate", "up", "down")
    }
    repacked = {name for name in placements if "down" not in name or name.startswith("blk.1.")}
    overrides = ExpertBuffers(placements, repacked).overrides
    assert overrides[2].pattern is None
    for name in (*placements, "blk.1.ffn_down_exps.weight.scale", "blk.111.ffn_gate_exps.weight"):
        first = next(index for index in range(2) if re.search(overrides[index].pattern, name.encode()))
        assert (first == 0) == (name in repacked)
    assert re.search(overrides[1].pattern, b"blk.0.ffn_gate_shexp.weight") is None


# ---- the same logits as default llama.cpp


@pytest.mark.parametrize("expert_type", ["Q4_K", "Q4_0", "Q8_0", "IQ4_NL", "MXFP4", "Q6_K", "F16"])
@pytest.mark.parametrize("architecture", ["qwen3moe", "olmoe", "qwen2moe"])
def test_logits_are_those_of_default_llama_cpp_while_experts_come_and_go(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, expert_type: str
) -> None:
    path = tiny_model(TinySpec(architecture=architecture, expert_type=expert_type, experts=16, other_type="Q8_0"))
    wanted = Repacker().wants(expert_part(expert_type), 2)
    with closing(expertier(path, "50%", "repacked", expert_sidecar_dir=str(tmp_path))) as llm:
        assert (PACKED in llm.mode_line()) == wanted
        assert len(names(tmp_path)) == wanted
        assert trace(llm) == stock_trace(path, "repacked")
        assert llm.offload.stats().evictions


@pytest.mark.parametrize(
    ("expert_type", "down_type"), [("Q4_K", "Q6_K"), ("F16", "Q4_0"), ("Q4_0", "Q8_0"), ("IQ4_NL", "Q4_K")]
)
@pytest.mark.parametrize("architecture", ["qwen3moe", "hy_v3", "gpt-oss"])
def test_a_layer_may_mix_repacked_and_plain_parts(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, expert_type: str, down_type: str
) -> None:
    path = tiny_model(
        TinySpec(architecture=architecture, expert_type=expert_type, down_type=down_type, experts=16, layers=4)
    )
    with closing(expertier(path, "50%", "repacked", expert_sidecar_dir=str(tmp_path))) as llm:
        kinds = {part.type_name for part in llm._kernels.pack.parts.values()} if llm._kernels.pack else set()
        assert kinds == {name for name in (expert_type, down_type) if Repacker().wants(expert_part(name), 2)}
        assert trace(llm) == stock_trace(path, "repacked")
        assert llm.offload.stats().evictions


@needs_q4_k
@pytest.mark.parametrize("changes", [{"n_threads": 2, "n_threads_batch": 2}, {"n_ubatch": 64}, {"n_ubatch": 3}])
def test_other_thread_counts_and_micro_batches_give_the_same_logits_too(
    tiny_model: TinyModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tiny_model(Q4_K)
    with closing(expertier(path, "50%", "repacked", expert_sidecar_dir=str(tmp_path), **changes)) as llm:
        assert trace(llm) == stock_trace(path, "repacked", **changes)


@needs_q4_k
def test_a_split_model_has_one_sidecar_with_the_same_experts(tiny_model: TinyModel, tmp_path: Path) -> None:
    single, split = tiny_model(Q4_K), tiny_model(TinySpec(**{**vars(Q4_K), "files": 4}))
    with closing(expertier(split, "50%", "repacked", expert_sidecar_dir=str(tmp_path))) as llm:
        assert trace(llm) == stock_trace(single, "repacked")
        assert [name.partition(".")[0] for name in names(tmp_path)] == [split.stem]


@needs_q4_k
def test_repack_off_gives_the_plain_kernels_and_writes_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model(Q4_K)
    with closing(expertier(path, "50%", "plain", expert_sidecar_dir=str(tmp_path))) as llm:
        assert "kernels plain (repack off)" in llm.mode_line()
        assert trace(llm) == stock_trace(path, "plain")
    assert names(tmp_path) == []


@repackable("Q4_0", "IQ4_NL")
def test_the_two_kinds_of_kernels_can_be_told_apart_by_their_rounding(tiny_model: TinyModel) -> None:
    # If not, all the comparisons here would say nothing about which of them ran.
    paths = [tiny_model(TinySpec(experts=16, expert_type=kind, other_type="Q8_0")) for kind in ("Q4_0", "IQ4_NL")]
    assert any(stock_trace(path, "plain") != stock_trace(path, "repacked") for path in paths)


def test_by_default_models_that_are_not_repacked_still_run_as_default_llama_cpp(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    # The attention of this model is repacked by llama.cpp where it can be, the experts are not.
    path = tiny_model(TinySpec(expert_type="F16", other_type="Q4_0", experts=16))
    with closing(expertier(path, "50%", expert_repack="auto", expert_sidecar_dir=str(tmp_path))) as llm:
        assert "kernels plain (nothing to repack)" in llm.mode_line()
        assert trace(llm) == stock_trace(path, "repacked")
    assert names(tmp_path) == []


# ---- the file


@needs_q4_k
def test_the_sidecar_lies_next_to_the_model_and_is_written_once(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copy(tiny_model(Q4_K), tmp_path / "My Model.gguf")
    with closing(expertier(path, "50%", expert_repack="auto")) as llm:
        assert PACKED in llm.mode_line()
    (name,) = (name for name in names(tmp_path) if name != "My Model.gguf")
    prefix, key, suffix = name.rsplit(".", 2)
    assert (prefix, len(key), suffix) == ("My Model", 8, "expertier")
    assert f"writing repacked experts (5.07 MiB) to {tmp_path / name}" in capsys.readouterr().err
    written = (tmp_path / name).stat()
    with closing(expertier(path, "50%", expert_repack="auto")) as llm:
        assert PACKED in llm.mode_line()
    again = (tmp_path / name).stat()
    assert (written.st_ino, written.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert "writing" not in capsys.readouterr().err


@needs_q4_k
def test_sidecars_of_other_versions_are_named_when_a_new_one_is_written(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copy(tiny_model(Q4_K), tmp_path / "m [1].gguf")
    for name in ("m [1].0123abcd.expertier", "m 1.0123abcd.expertier", "m [1].x.0123abcd.expertier"):
        (tmp_path / name).touch()
    choose_kernels(read_gguf(path), read_layout(path), OffloadOptions())
    assert "delete if not needed: m [1].0123abcd.expertier\n" in capsys.readouterr().err


@needs_q4_k
def test_every_expert_of_the_sidecar_is_the_repacked_expert_of_the_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model(Q4_K)
    pack = kernels_of(path, tmp_path).pack
    assert pack is not None
    model, packed = path.read_bytes(), pack.path.read_bytes()
    repacker = Repacker()
    for layer in read_gguf(path).layers:
        for part in layer.parts:
            found = pack.parts[part.name]
            for expert in range(part.experts):
                source = ctypes.create_string_buffer(model[part.offset + expert * part.stride :][: part.expert_bytes])
                target = ctypes.create_string_buffer(part.expert_bytes)
                repacker.repack("Q4_K", part.shape[:2], ctypes.addressof(source), ctypes.addressof(target))
                start = found.offset + expert * found.stride
                assert packed[start : start + part.expert_bytes] == target.raw


@needs_q4_k
def test_models_with_the_same_header_have_sidecars_of_their_own(tiny_model: TinyModel, tmp_path: Path) -> None:
    first, second = (tiny_model(TinySpec(**{**vars(Q4_K), "seed": seed})) for seed in (0, 1))
    assert read_gguf(first).fingerprint == read_gguf(second).fingerprint
    packs = [kernels_of(path, tmp_path).pack for path in (first, second)]
    assert packs[0] and packs[1] and packs[0].key.short != packs[1].key.short
    copied = tmp_path / packs[1].path.name
    shutil.copy(packs[0].path, copied)  # as if one had been renamed to stand in for the other
    pack = kernels_of(second, tmp_path).pack
    assert pack is not None and pack.key == packs[1].key
    assert copied.read_bytes() != packs[0].path.read_bytes()


@needs_q4_k
def test_a_sidecar_with_a_damaged_header_is_written_again(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_model(Q4_K)
    pack = kernels_of(path, tmp_path).pack
    assert pack is not None
    good = pack.path.read_bytes()
    pack.path.write_bytes(good[:200] + b"\xff" + good[201:])
    with caplog.at_level(logging.WARNING, "expertier"):
        assert PACKED in kernels_of(path, tmp_path).words
    assert "damaged" in caplog.text
    assert pack.path.read_bytes() == good


@needs_q4_k
def test_where_the_model_lies_cannot_be_written_to_the_cache_directory_is_used(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, cache = tmp_path / "models", tmp_path / "cache"
    models.mkdir()
    path = shutil.copy(tiny_model(Q4_K), models / "m.gguf")
    monkeypatch.setenv("EXPERTIER_CACHE", str(cache))
    open_file = os.open

    def guarded(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT and Path(name).is_relative_to(models):  # as root, permissions would not stop us
            raise PermissionError(13, "Permission denied", str(name))
        return open_file(name, flags, *rest)

    monkeypatch.setattr(os, "open", guarded)
    kernels = choose_kernels(read_gguf(path), read_layout(path), OffloadOptions())
    assert kernels.words == PACKED
    assert kernels.files[0].parent == cache / "sidecars"
    assert names(models) == ["m.gguf"]


@needs_q4_k
def test_without_a_place_for_the_sidecar_auto_runs_plain_and_says_so_and_on_refuses(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, file = tiny_model(Q4_K), tmp_path / "file"
    file.touch()
    with (
        caplog.at_level(logging.WARNING, "expertier"),
        closing(expertier(path, "50%", expert_repack="auto", expert_sidecar_dir=str(file))) as llm,
    ):
        assert "kernels plain (no sidecar)" in llm.mode_line()
        assert "sidecar_dir" in caplog.text
        assert trace(llm) == stock_trace(path, "plain")
    with pytest.raises(SidecarError, match="cannot be written"):
        expertier(path, "50%", "repacked", expert_sidecar_dir=str(file))


@needs_q4_k
def test_on_a_full_disk_on_refuses_with_the_bytes_needed_and_auto_runs_plain(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(Q4_K)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(SidecarError, match=r"needs 5\.07 MiB .*4096 bytes\) are free"):
        kernels_of(path, tmp_path, "on")
    kernels = kernels_of(path, tmp_path, "auto")
    assert not kernels.extra_buffer_types and not kernels.repacked and kernels.pack is None
    assert names(tmp_path) == []


@needs_q4_k
def test_ctrl_c_while_writing_leaves_nothing_behind(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repack, count = sidecar._repack_one, 0

    def interrupted(*arguments: Any) -> memoryview:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return repack(*arguments)

    monkeypatch.setattr(sidecar, "_repack_one", interrupted)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        kernels_of(tiny_model(Q4_K), tmp_path)
    assert names(tmp_path) == []
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)


@needs_q4_k
def test_a_terminal_gets_a_progress_bar(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    kernels_of(tiny_model(Q4_K), tmp_path)
    assert "writing repacked experts" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()


# ---- damage that shows only when an expert is read


def spoil(pack: Pack, name: str, expert: int) -> None:
    part = pack.parts[name]
    with pack.path.open("r+b") as file:
        file.seek(part.offset + expert * part.stride + part.expert_bytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@needs_q4_k
def test_an_expert_with_a_wrong_checksum_is_a_named_error_and_never_text(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model(Q4_K)
    pack = kernels_of(path, tmp_path).pack
    assert pack is not None
    for expert in range(16):
        spoil(pack, "blk.1.ffn_down_exps.weight", expert)
    with closing(expertier(path, "50%", "repacked", expert_sidecar_dir=str(tmp_path))) as llm:
        for _ in range(2):
            with pytest.raises(ExpertLoadError, match=r"layer 1 .*wrong checksum.*Delete it") as caught:
                llm.create_completion("the quick brown fox", max_tokens=4)
            assert isinstance(caught.value.__cause__, SidecarError)
    pack.path.unlink()
    with closing(expertier(path, "50%", "repacked", expert_sidecar_dir=str(tmp_path))) as llm:
        assert trace(llm) == stock_trace(path, "repacked")


@needs_q4_k
def test_an_expert_that_was_right_once_is_not_checked_again(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(Q4_K)
    with closing(expertier(path, "50%", "repacked", expert_sidecar_dir=str(tmp_path))) as llm:
        trace(llm)
        pack = llm._kernels.pack
        assert pack is not None
        for layer in llm.catalog.layers:
            for part in layer.parts:
                for expert in np.flatnonzero(llm.offload.resident(layer.layer)).tolist():
                    assert pack.check(part.name, expert) is None
        for layer in llm.catalog.layers:  # in turns, because they do not fit at once
            llm.offload.acquire(layer.layer, range(layer.experts)).release()
        monkeypatch.setattr(pack_module, "checksum", lambda _: pytest.fail("checked again"))
        evictions = llm.offload.stats().evictions
        llm.reset()
        assert trace(llm) == stock_trace(path, "repacked")
        assert llm.offload.stats().evictions > evictions


def test_default_llama_cpp_really_repacks_what_the_repacker_wants(
    tiny_model: TinyModel, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_model(TinySpec(expert_type="Q4_K", down_type="Q6_K"))
    with closing(stock_twin(path, "repacked", verbose=True)):
        said = capfd.readouterr().err
    repacker = Repacker()
    for layer in read_gguf(path).layers:
        for part in layer.parts:
            assert (f"repack tensor {part.name} " in said) == repacker.wants(part, layer.top_k)
