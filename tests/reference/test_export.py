from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest

from expertier.errors import UnsupportedModelError, UnsupportedOptionError
from reference_model import export_gguf as module
from reference_model.build import main, reference_gguf
from reference_model.checkpoint import Checkpoint
from reference_model.export_gguf import export_gguf, pre_tokenizer_name, quantise
from reference_model.export_hf import export_hf
from reference_model.files import DiskFullError, new_file
from reference_model.tokenizer import load_tokenizer
from reference_model.verify import llama_logits, torch_logits

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model_path(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(checkpoint, path, factor=8)
    return path


def test_llama_cpp_cuts_held_out_text_into_the_same_tokens(
    base: Path, model_path: Path, held_out_texts: list[str]
) -> None:
    tokenizer = load_tokenizer(base)
    llama = llama_cpp.Llama(str(model_path), vocab_only=True, verbose=False)
    try:
        for text in [*held_out_texts, "It's 12345 o'clock,\r\n\t  DON'T\n\n\n panic… naïve 日本語 \u00a0 end  "]:
            assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text).ids
    finally:
        llama.close()


def test_stock_llama_cpp_continues_text_as_torch_does(
    checkpoint: Checkpoint, base: Path, model_path: Path, held_out_texts: list[str]
) -> None:
    ids = load_tokenizer(base).encode(held_out_texts[0]).ids[:128]
    ours, theirs = torch_logits(checkpoint, ids)[0].numpy(), llama_logits(model_path, ids)
    best = ours.max(-1)
    # What llama.cpp would write next is torch's choice, or as good as it where two tokens tie within rounding.
    chosen = ours[np.arange(len(ids)), theirs.argmax(-1)]
    assert np.all(best - chosen < 0.05)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.95


def test_repeating_quantised_blocks_equals_quantising_the_wide_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    # What widening saves: the float16 file of the full size is only made here, to compare with.
    export_gguf(checkpoint, tmp_path / "wide.gguf", factor=32)
    how = module.QUANTISATIONS["Q8_0"]
    assert how is not None
    quantise(tmp_path / "wide.gguf", tmp_path / "expected.gguf", how)
    export_gguf(checkpoint, tmp_path / "found.gguf", kind="Q8_0", factor=32)
    expected = {t.name: t for t in gguf.GGUFReader(tmp_path / "expected.gguf").tensors}
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "found.gguf").tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        np.testing.assert_array_equal(found[name].data, tensor.data, err_msg=name)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_file_comes_out_near_the_size_asked_for(checkpoint: Checkpoint, tmp_path: Path, kind: str) -> None:
    export_gguf(checkpoint, tmp_path / "model.gguf", kind=kind, size=8_000_000)
    assert (tmp_path / "model.gguf").stat().st_size == pytest.approx(8_000_000, rel=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_an_unknown_type_is_refused_with_the_known_ones(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="Choose F16"):
        export_gguf(checkpoint, tmp_path / "model.gguf", kind="Q3_K")


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        pre_tokenizer_name({"pre_tokenizer": {"type": "Whitespace"}})


def test_a_disk_too_small_is_found_out_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 70 << 20))
    with pytest.raises(DiskFullError, match=r"GB are needed in .* only 0\.07 GB are free"):
        export_gguf(checkpoint, tmp_path / "model.gguf", factor=1024)
    with pytest.raises(DiskFullError, match="--size"):
        export_hf(checkpoint, tmp_path / "hf", factor=1024)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_that_fills_up_meanwhile_is_a_named_error_and_leaves_no_temporary_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write_data", fill_the_disk)
    with pytest.raises(DiskFullError, match="became full"):
        export_gguf(checkpoint, tmp_path / "model.gguf", factor=8)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(path, 10) as part:
        part.write_text("half of the new o")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_builds_every_product_and_skips_what_exists(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--from", str(base), "--size", "8MB", "--type", "F16", "--hf", "--quiet"]
    assert main(arguments) == 0
    products = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(products) == 3
    assert products[0].suffix == ".gguf" and (products[1] / "config.json").is_file()
    assert products[2].name == "prompts.json" and products[2].is_file()
    before = products[0].stat().st_mtime_ns
    assert main(arguments) == 0
    assert products[0].stat().st_mtime_ns == before


def test_another_base_never_passes_for_this_one(base: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "other", factor=2)
    paths = [reference_gguf(None, out=tmp_path, base=folder, progress=False) for folder in (base, tmp_path / "other")]
    assert len(set(paths)) == 2
