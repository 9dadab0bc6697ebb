"""The small models that other tests rely on are real models to the stock engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from expertier.catalog.gguf import content_digest, read_gguf, read_layout, read_tensor
from expertier.catalog.gguf_header import TENSOR_TYPES
from support.tiny_gguf import ARCHITECTURES, EXPERT_TYPES, TinySpec, write_tiny

llama_cpp = pytest.importorskip("llama_cpp")
ggml = pytest.importorskip("llama_cpp._ggml")
pytestmark = pytest.mark.engine

TinyModel = Callable[[TinySpec], Path]
PROMPT = list(range(40, 60))
UNEVEN = TinySpec(hidden=96, feed_forward=160)


def stock_logits(path: Path) -> npt.NDArray[np.float32]:
    """Logits of the stock engine for every position of the prompt, shape (tokens, vocabulary)."""
    # One thread: idle OpenMP threads spin, and on a busy machine that takes seconds per model.
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, n_threads_batch=1, n_gpu_layers=0, logits_all=True, verbose=False
    )
    try:
        model.eval(PROMPT)
        return np.array(model.scores[: len(PROMPT)], dtype=np.float32)
    finally:
        model.close()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Path for a model that is deleted after the test: pytest keeps its directories, and these add up."""
    path = tmp_path / "m.gguf"
    yield path
    path.unlink(missing_ok=True)


def check_alive(logits: npt.NDArray[np.float32]) -> None:
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.5).all(), "the logits of a position hardly differ"
    assert (logits.std(axis=0) > 0.1).all(), "the logits hardly depend on the position"


@pytest.mark.parametrize("expert_type", EXPERT_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_with_every_type_loads_and_decodes_in_the_stock_engine(
    target: Path, architecture: str, expert_type: str
) -> None:
    spec = TinySpec(architecture=architecture, expert_type=expert_type)
    path = write_tiny(target, spec)
    check_alive(stock_logits(path))
    catalog = read_gguf(path)
    assert catalog.architecture == architecture
    assert catalog.block_count == spec.layers
    assert [layer.layer for layer in catalog.layers] == list(range(spec.dense_layers, spec.layers))
    for layer in catalog.layers:
        assert (layer.experts, layer.top_k) == (spec.experts, spec.top_k)
        assert {part.type_name for part in layer.parts} == {expert_type}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_split_model_gives_the_same_logits_bit_by_bit(tiny_model: TinyModel, architecture: str) -> None:
    single = tiny_model(TinySpec(architecture=architecture))
    parted = tiny_model(TinySpec(architecture=architecture, files=4))
    assert parted.name.endswith("-00001-of-00004.gguf")
    assert len(read_gguf(parted).files) == 4
    assert np.array_equal(stock_logits(single), stock_logits(parted))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_that_are_no_multiples_of_a_page_load_too(target: Path, architecture: str) -> None:
    spec = TinySpec(architecture=architecture, hidden=96, feed_forward=160, experts=12, top_k=3, expert_type="Q4_0")
    path = write_tiny(target, spec)
    assert all(part.expert_bytes % 4096 for layer in read_gguf(path).layers for part in layer.parts)
    check_alive(stock_logits(path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_down_matrices_may_have_another_type(target: Path, architecture: str) -> None:
    spec = TinySpec(architecture=architecture, expert_type="Q4_K", down_type="Q6_K", other_type="Q8_0")
    path = write_tiny(target, spec)
    for part in read_gguf(path).layers[0].parts:
        assert part.type_name == ("Q6_K" if part.role == "down" else "Q4_K")
    check_alive(stock_logits(path))


@pytest.mark.parametrize("alignment", [64, 4096])
def test_another_alignment_changes_places_and_not_logits(tiny_model: TinyModel, alignment: int) -> None:
    aligned = tiny_model(TinySpec(hidden=96, feed_forward=160, alignment=alignment))
    assert all(part.offset % alignment == 0 for layer in read_gguf(aligned).layers for part in layer.parts)
    assert np.array_equal(stock_logits(aligned), stock_logits(tiny_model(UNEVEN)))


def test_the_same_specification_gives_the_same_file_and_another_seed_another_model(tmp_path: Path) -> None:
    first, again = (write_tiny(tmp_path / f"{name}.gguf", UNEVEN) for name in "ab")
    other = write_tiny(tmp_path / "c.gguf", TinySpec(hidden=96, feed_forward=160, seed=1))
    assert first.read_bytes() == again.read_bytes()
    assert content_digest(read_layout(other)) != content_digest(read_layout(first))
    assert not np.array_equal(stock_logits(other), stock_logits(first))


def test_models_that_differ_in_expert_type_have_the_same_routers(tiny_model: TinyModel) -> None:
    router = "blk.1.ffn_gate_inp.weight"
    plain, packed = (read_layout(tiny_model(TinySpec(expert_type=kind))) for kind in ("F16", "Q4_K"))
    assert np.array_equal(read_tensor(plain, router), read_tensor(packed, router))


def test_skewed_routers_have_rows_of_very_different_length(tiny_model: TinyModel) -> None:
    def spread(skew: float) -> float:
        path = tiny_model(TinySpec(experts=32, feed_forward=32, expert_type="F16", skew=skew))
        lengths = np.linalg.norm(read_tensor(read_layout(path), "blk.1.ffn_gate_inp.weight"), axis=1)
        return float(lengths.max() / lengths.min())

    assert spread(0.0) < 1.5 < 3.0 < spread(2.0)


@pytest.mark.parametrize(
    "spec",
    [
        TinySpec(architecture="gpt2"),
        TinySpec(expert_type="Q2_K"),
        TinySpec(hidden=96, expert_type="Q4_K"),
        TinySpec(feed_forward=128, down_type="Q6_K"),
        TinySpec(hidden=100, expert_type="F16"),
        TinySpec(vocabulary=100),
        TinySpec(architecture="deepseek2", layers=1),
        TinySpec(files=1000),
    ],
)
def test_a_specification_that_cannot_be_written_is_refused(target: Path, spec: TinySpec) -> None:
    with pytest.raises(ValueError, match=r"unknown architecture|cannot store|do not go together|cannot be split"):
        write_tiny(target, spec)


def test_the_type_table_agrees_with_the_engine() -> None:
    library = ggml.libggml
    for type_id, (_, block, nbytes) in TENSOR_TYPES.items():
        assert (library.ggml_blck_size(type_id), library.ggml_type_size(type_id)) == (block, nbytes)
