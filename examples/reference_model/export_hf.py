"""Writing the model as a Hugging Face folder, for vLLM and transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from expertier.errors import UnsupportedOptionError
from reference_model.checkpoint import Checkpoint
from reference_model.export_gguf import Progress
from reference_model.files import new_file, require_space
from reference_model.tokenizer import END_OF_TEXT
from reference_model.widen import PROJECTIONS, choose_factor, granule, scaled_expert, widen_axis

_BYTES = 2  # bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor to write: name, shape, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    expert: tuple[int, int, str] | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * _BYTES


def export_hf(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    size: int | None = None,
    factor: int | None = None,
    shard_size: int = 4_000_000_000,
    progress: Progress | None = None,
) -> int:
    """Write a checkpoint, widened, as bfloat16 safetensors with configuration and tokenizer.

    Parameters
    ----------
    checkpoint : Checkpoint
        The trained base.
    folder : Path
        Where to write. ``config.json`` comes last, so that a folder that has one is whole.
    size : int, optional
        Wanted bytes of all weights; the widening factor follows from it.
    factor : int, optional
        The widening factor itself. With neither the model stays as trained.
    shard_size : int
        Most bytes in one file.
    progress : callable, optional
        Called with bytes written and bytes in all.

    Returns
    -------
    int
        The widening factor.

    Raises
    ------
    SizeError
        The size is below the smallest possible one.
    DiskFullError
        There is no room.
    """
    config = checkpoint.config
    if factor is None:
        factor = 1
        if size is not None:
            fixed = sum(entry.size for entry in _entries(checkpoint, 1) if entry.expert is None)
            step = granule(config.moe_intermediate_size)
            factor = choose_factor(size, fixed, config.expert_parameters * _BYTES, step)
    if factor < 1:
        raise UnsupportedOptionError(f"A widening factor of {factor} makes no model.", "It must be at least 1.")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(_entries(checkpoint, factor), shard_size)
    total = sum(entry.size for shard in shards for entry in shard)
    require_space(folder, total)
    (folder / "config.json").unlink(missing_ok=True)

    index: dict[str, str] = {}
    before = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= {entry.name: name for entry in shard}
        before = _write_shard(checkpoint, shard, folder / name, factor, before, total, progress)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    if checkpoint.tokenizer_path.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(checkpoint.tokenizer_path, folder / "tokenizer.json")
    write_configuration(checkpoint, folder, factor)
    return factor


def write_configuration(checkpoint: Checkpoint, folder: Path, factor: int) -> None:
    """Write the JSON files beside the weights."""
    config = checkpoint.config.widened(factor)
    end = Tokenizer.from_file(str(checkpoint.tokenizer_path)).token_to_id(END_OF_TEXT) or 0
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
        },
    )
    _write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    _write_json(folder / "config.json", {**config.to_hf(), "bos_token_id": end, "eos_token_id": end})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _entries(checkpoint: Checkpoint, factor: int) -> Iterator[_Entry]:
    config = checkpoint.config
    yield _Entry(name="model.embed_tokens.weight", shape=(config.vocab_size, config.hidden_size))
    yield _Entry(name="model.norm.weight", shape=(config.hidden_size,))
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    wide = config.moe_intermediate_size * factor
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for part, shape in {
            "input_layernorm": (config.hidden_size,),
            "self_attn.q_proj": (queries, config.hidden_size),
            "self_attn.k_proj": (keys, config.hidden_size),
            "self_attn.v_proj": (keys, config.hidden_size),
            "self_attn.o_proj": (config.hidden_size, queries),
            "self_attn.q_norm": (config.head_dim,),
            "self_attn.k_norm": (config.head_dim,),
            "post_attention_layernorm": (config.hidden_size,),
            "mlp.gate": (config.num_experts, config.hidden_size),
        }.items():
            yield _Entry(name=f"{prefix}{part}.weight", shape=shape)
        for expert in range(config.num_experts):
            for projection in PROJECTIONS:
                down = projection == "down"
                yield _Entry(
                    name=f"{prefix}mlp.experts.{expert}.{projection}_proj.weight",
                    shape=(config.hidden_size, wide) if down else (wide, config.hidden_size),
                    expert=(layer, expert, projection),
                )


def _shards(entries: Iterator[_Entry], shard_size: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    return shards


def _write_shard(
    checkpoint: Checkpoint,
    shard: list[_Entry],
    path: Path,
    factor: int,
    before: int,
    total: int,
    progress: Progress | None,
) -> int:
    """Write one safetensors file tensor by tensor; the library's own writer wants all of them in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        header[entry.name] = {"dtype": "BF16", "shape": entry.shape, "data_offsets": [offset, offset + entry.size]}
        offset += entry.size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with new_file(path, offset + len(head)) as part, part.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in shard:
            before += file.write(_data(checkpoint, entry, factor).data)
            if progress is not None:
                progress(before, total)
    return before


def _data(checkpoint: Checkpoint, entry: _Entry, factor: int) -> NDArray[np.int16]:
    """Return a tensor's bfloat16 bits, shape as in the file."""
    if entry.expert is None:
        return _bits(torch.from_numpy(checkpoint.tensor(entry.name)))
    layer, expert, projection = entry.expert
    repeats = [1, 1]
    repeats[widen_axis(projection)] = factor
    return np.tile(_bits(torch.from_numpy(scaled_expert(checkpoint, layer, expert, projection, factor))), repeats)


def _bits(tensor: torch.Tensor) -> NDArray[np.int16]:
    # numpy has no bfloat16, and the file only wants the bits.
    bits: NDArray[np.int16] = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    return bits
