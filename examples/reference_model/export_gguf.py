"""Writing the model as GGUF, for llama.cpp.

One path serves every type. A small file is made first, widened just enough for the quantiser, and quantised by
llama.cpp itself where asked. The big file repeats its blocks: as the quantiser treats each block by itself, the result
is, byte for byte, what quantising the big file would give, without ever writing that one in float16.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from expertier.errors import ExpertierError, UnsupportedModelError, UnsupportedOptionError
from reference_model.checkpoint import Checkpoint
from reference_model.config import ReferenceConfig
from reference_model.files import new_file, require_space
from reference_model.tokenizer import QWEN2_PATTERN
from reference_model.widen import PROJECTIONS, choose_factor, granule, scaled_expert, widen_axis

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How llama.cpp's quantiser is called for a type."""

    file_type: gguf.LlamaFileType
    pure: bool


# F16 is written as it is. Pure means every expert tensor has the type of that name; Q4_K_M is llama.cpp's usual mix.
QUANTISATIONS: dict[str, Quantisation | None] = {
    "F16": None,
    "Q8_0": Quantisation(file_type=gguf.LlamaFileType.MOSTLY_Q8_0, pure=False),
    "Q4_K": Quantisation(file_type=gguf.LlamaFileType.MOSTLY_Q4_K_S, pure=True),
    "Q4_K_M": Quantisation(file_type=gguf.LlamaFileType.MOSTLY_Q4_K_M, pure=False),
}

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}


def export_gguf(
    checkpoint: Checkpoint,
    path: Path,
    *,
    kind: str = "F16",
    size: int | None = None,
    factor: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a checkpoint as one GGUF file.

    Parameters
    ----------
    checkpoint : Checkpoint
        The trained base.
    path : Path
        The file to make.
    kind : {"F16", "Q8_0", "Q4_K", "Q4_K_M"}
        Type of the weights.
    size : int, optional
        Wanted bytes of the file; the widening factor follows from it.
    factor : int, optional
        The widening factor itself. With neither the model stays as trained.
    progress : callable, optional
        Called with bytes written and bytes in all.

    Returns
    -------
    int
        The widening factor.

    Raises
    ------
    UnsupportedOptionError
        An unknown type, or a factor that the type's blocks do not allow.
    SizeError
        The size is below the smallest possible one.
    DiskFullError
        There is no room.
    """
    kind = kind.upper()
    if kind not in QUANTISATIONS:
        raise UnsupportedOptionError(
            f"{kind} is not a type this exporter knows.", f"Choose {', '.join(QUANTISATIONS)}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    step = granule(checkpoint.config.moe_intermediate_size)
    # The quantiser needs whole blocks in a row; float16 has none.
    unit = 1 if kind == "F16" else step
    if factor is None and size is None:
        factor = unit
    with tempfile.TemporaryDirectory(prefix=".reference-", dir=path.parent) as scratch:
        if factor is None:
            assert size is not None
            # Bytes per factor are known from a file of the type: a mix of types has no formula.
            trial = _small_file(checkpoint, Path(scratch) / "trial.gguf", kind, unit, unit)
            experts = sum(int(t.n_bytes) for t in gguf.GGUFReader(trial).tensors if "_exps." in t.name)
            factor = choose_factor(size, trial.stat().st_size - experts, experts / unit, step)
            trial.unlink()
        if factor % unit:
            raise UnsupportedOptionError(f"{kind} needs a widening factor that is a multiple of {unit}, not {factor}.")
        small = _small_file(checkpoint, Path(scratch) / "small.gguf", kind, unit, factor)
        _repeat_blocks(checkpoint, small, path, factor // unit, factor, progress)
    return factor


def _small_file(checkpoint: Checkpoint, path: Path, kind: str, unit: int, factor: int) -> Path:
    """Write the model widened by `unit` but scaled for `factor`."""
    config = checkpoint.config
    require_space(path.parent, 3 * (config.expert_parameters * unit + config.vocab_size * config.hidden_size))
    writer = gguf.GGUFWriter(path, "qwen3moe")
    add_metadata(writer, checkpoint, config.widened(unit), int(gguf.LlamaFileType.MOSTLY_F16), "trained")
    for name, shape, dtype in _tensors(config.widened(unit)):
        writer.add_tensor_info(name, shape, np.dtype(dtype), int(np.prod(shape)) * np.dtype(dtype).itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, dtype in _tensors(config):
        writer.write_tensor_data(np.ascontiguousarray(_load(checkpoint, name, unit, factor).astype(dtype)))
    writer.close()
    how = QUANTISATIONS[kind]
    if how is None:
        return path
    quantised = path.with_suffix(".quantised.gguf")
    quantise(path, quantised, how)
    path.unlink()
    return quantised


def _tensors(config: ReferenceConfig) -> Iterator[tuple[str, tuple[int, ...], type[np.generic]]]:
    """Yield name, numpy shape and type of every tensor, in the order of the file."""
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "token_embd.weight", (config.vocab_size, hidden), np.float16
    yield "output_norm.weight", (hidden,), np.float32
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (hidden,), np.float32
        yield block + "attn_q.weight", (queries, hidden), np.float16
        yield block + "attn_k.weight", (keys, hidden), np.float16
        yield block + "attn_v.weight", (keys, hidden), np.float16
        yield block + "attn_output.weight", (hidden, queries), np.float16
        yield block + "attn_q_norm.weight", (config.head_dim,), np.float32
        yield block + "attn_k_norm.weight", (config.head_dim,), np.float32
        yield block + "ffn_norm.weight", (hidden,), np.float32
        # The router stays in float32 as llama.cpp has it: a rounded router could choose other experts.
        yield block + "ffn_gate_inp.weight", (experts, hidden), np.float32
        yield block + "ffn_gate_exps.weight", (experts, inner, hidden), np.float16
        yield block + "ffn_up_exps.weight", (experts, inner, hidden), np.float16
        yield block + "ffn_down_exps.weight", (experts, hidden, inner), np.float16


def _load(checkpoint: Checkpoint, name: str, unit: int, factor: int) -> NDArray[np.float32]:
    """Return a tensor of the small file under its GGUF name."""
    if name == "token_embd.weight":
        return checkpoint.tensor("model.embed_tokens.weight")
    if name == "output_norm.weight":
        return checkpoint.tensor("model.norm.weight")
    _, number, part, _ = name.split(".")
    layer = int(number)
    prefix = f"model.layers.{layer}."
    if part == "ffn_gate_inp":
        return checkpoint.tensor(prefix + "mlp.gate.weight")
    if part in _ATTENTION or part in _NORMS:
        return checkpoint.tensor(f"{prefix}{(_ATTENTION | _NORMS)[part]}.weight")
    projection = projection_of(part)
    experts = np.stack(
        [scaled_expert(checkpoint, layer, e, projection, factor) for e in range(checkpoint.config.num_experts)]
    )
    repeats = [1, 1, 1]
    repeats[1 + widen_axis(projection)] = unit
    return np.tile(experts, repeats)


def projection_of(part: str) -> str:
    """Return ``gate``, ``up`` or ``down`` of a name like ``ffn_up_exps``."""
    return next(p for p in PROJECTIONS if f"ffn_{p}_exps" in part)


def _repeat_blocks(
    checkpoint: Checkpoint, small: Path, path: Path, times: int, factor: int, progress: Progress | None
) -> None:
    """Copy a GGUF file, with every expert `times` as wide, one expert at a time."""
    reader = gguf.GGUFReader(small)
    tensors = list(reader.tensors)
    total = sum(int(t.n_bytes) * (times if "_exps." in t.name else 1) for t in tensors)
    file_type = int(reader.fields["general.file_type"].contents())
    # A little more than the tensors, for the vocabulary and the table of tensors.
    with new_file(path, total + (2 << 20)) as part:
        writer = gguf.GGUFWriter(part, "qwen3moe")
        add_metadata(
            writer, checkpoint, checkpoint.config.widened(factor), file_type, f"trained, widened {factor} times"
        )
        for tensor in tensors:
            shape = list(tensor.data.shape)
            if "_exps." in tensor.name:
                shape[1 + widen_axis(projection_of(tensor.name))] *= times
            count = int(tensor.n_bytes) * (times if "_exps." in tensor.name else 1)
            writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, count, raw_dtype=tensor.tensor_type)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_data(writer, tensors, times, total, progress)
        finally:
            writer.close()


def _write_data(writer: gguf.GGUFWriter, tensors: list[Any], times: int, total: int, progress: Progress | None) -> None:
    # The writer's own write_tensor_data wants a whole tensor in memory, which here may be gigabytes.
    assert writer.fout is not None
    file: BinaryIO = writer.fout[0]
    writer.write_padding(file, file.tell())
    written = 0
    for tensor in tensors:
        start = written
        if "_exps." in tensor.name:
            repeats = [1, 1]
            repeats[widen_axis(projection_of(tensor.name))] = times
            for expert in tensor.data:
                written += file.write(np.tile(expert, repeats).data)
                if progress is not None:
                    progress(written, total)
        else:
            written += file.write(np.ascontiguousarray(tensor.data).data)
        writer.write_padding(file, written - start)


def quantise(source: Path, target: Path, how: Quantisation) -> None:
    """Run llama.cpp's quantiser on one file.

    Raises
    ------
    ExpertierError
        The quantiser refused.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 2
    parameters.ftype = int(how.file_type)
    parameters.pure = how.pure
    if how.pure:
        # The embedding is the output head too: its type decides the text, and hardly the size.
        parameters.token_embedding_type = int(gguf.GGMLQuantizationType.Q8_0)

    def be_quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        """Drop the quantiser's line per tensor."""

    silent = llama_cpp.llama_log_callback(be_quiet)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    try:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    finally:
        llama_cpp.llama_log_set(_default_log(), ctypes.c_void_p(0))
    if failed:
        raise ExpertierError(f"llama.cpp could not quantise {source}.", "Is the disk full?")


def _default_log() -> Any:
    """Return llama-cpp-python's own log callback, to be put back."""
    from llama_cpp import _logger

    return _logger.llama_log_callback


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a ``tokenizer.json`` cuts text before merging.

    Raises
    ------
    UnsupportedModelError
        llama.cpp has no name for it that is known here.
    """
    outer = tokenizer.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers") or [outer]
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    if patterns == [QWEN2_PATTERN]:
        return "qwen2"
    if not patterns and [part.get("type") for part in parts] == ["ByteLevel"] and parts[0].get("use_regex"):
        return "gpt-2"
    raise UnsupportedModelError("The tokenizer cuts text in a way that has no known name in llama.cpp.")


def add_metadata(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, config: ReferenceConfig, file_type: int, description: str
) -> None:
    """Add the architecture's numbers and the vocabulary to a GGUF header."""
    writer.add_name("expertier-reference")
    writer.add_description(f"Small Qwen3-MoE, {description}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.moe_intermediate_size * config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    tokenizer = json.loads(checkpoint.tokenizer_path.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    special = {entry["content"]: int(entry["id"]) for entry in tokenizer["added_tokens"] if entry["special"]}
    vocabulary |= special
    by_id = {index: token for token, index in vocabulary.items()}
    tokens = [by_id.get(index, f"[unused {index}]") for index in range(config.vocab_size)]
    kinds = [
        gguf.TokenType.UNUSED if i not in by_id else gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL
        for i, t in enumerate(tokens)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(merges)
    end = special.get("<|endoftext|>", 0)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
