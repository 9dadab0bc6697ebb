"""Writes small mixture-of-experts models with random weights that a stock llama.cpp loads and decodes.

The routers of such models route almost uniformly: good for testing that every byte arrives, useless for measuring
caches. The same specification always gives the same file, and the values of a tensor depend on nothing but its name,
its shape, its type and the seed: a model that differs only in the type of its experts has the same routers.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

from support.split_gguf import split_gguf

# hy_v3 stands for the architectures with gate and up fused into one tensor.
ARCHITECTURES: Final = ("qwen3moe", "olmoe", "llama", "qwen2moe", "deepseek2", "gpt-oss", "hy_v3")
EXPERT_TYPES: Final = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")

_HEAD: Final = 32  # elements of an attention head
_SPECIALS: Final = ("<|endoftext|>", "<|im_end|>")
_SIGMOID_GATING: Final = 2


@dataclass(frozen=True, kw_only=True)
class TinySpec:
    """What a small model looks like.

    Attributes
    ----------
    architecture : str
        One of `ARCHITECTURES`.
    layers, experts, top_k : int
        Transformer layers (of ``deepseek2`` and ``hy_v3`` the first is dense), routed experts, experts per token.
    hidden, feed_forward : int
        Width of the model and of one expert; multiples of the block sizes of the types in use (32, or 256 for K types).
    vocabulary : int
        Number of tokens; at least 258.
    expert_type : str
        Storage type of the routed experts, one of `EXPERT_TYPES`.
    down_type : str, optional
        Another one for the down matrices, as in mixed quantisations.
    other_type : str
        Storage type of attention, embedding and shared experts.
    alignment : int
        Tensors start at multiples of this in the file.
    files : int
        Number of files to split the model into.
    skew : float
        Above 0, some experts are favoured by the routers: their rows are up to several times longer.
    idle_layers : int
        So many of the layers, the last, count as layers that predict further tokens (multi-token prediction).
    seed : int
        Seed of all weights.
    """

    architecture: str = "qwen3moe"
    layers: int = 3
    experts: int = 8
    top_k: int = 2
    hidden: int = 256
    feed_forward: int = 256
    vocabulary: int = 320
    expert_type: str = "Q8_0"
    down_type: str | None = None
    other_type: str = "F16"
    alignment: int = 32
    files: int = 1
    skew: float = 0.0
    idle_layers: int = 0
    seed: int = 0

    @property
    def dense_layers(self) -> int:
        """Leading layers without routed experts."""
        return 1 if self.architecture in ("deepseek2", "hy_v3") else 0

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden // _HEAD

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        if self.architecture == "olmoe" or self.heads % 2:  # OLMoE normalises keys over the whole width
            return self.heads
        return self.heads // 2

    @property
    def expert_groups(self) -> int:
        """Groups of experts of which half are open to a token; 0 without groups."""
        grouped = self.architecture == "deepseek2" and self.experts % 4 == 0 and self.experts // 4 >= 2
        return 4 if grouped and self.top_k <= self.experts // 2 else 0


@dataclass(frozen=True)
class _Weight:
    name: str
    shape: tuple[int, ...]  # numpy order, slowest first
    type_name: str = "F32"
    spread: float = 0.0  # standard deviation; 0 marks a norm (around 1)


def write_tiny(path: str | os.PathLike[str], spec: TinySpec) -> Path:
    """Write a model.

    Parameters
    ----------
    path : path
        File to write; of a split model the prefix is taken from it (``m.gguf`` becomes ``m-00001-of-00003.gguf``).
    spec : TinySpec
        What to write.

    Returns
    -------
    Path
        The file to name to an engine (the first one of a split model).

    Raises
    ------
    ValueError
        `spec` names something unknown or sizes that do not go together.
    """
    target = Path(path)
    _check(spec)
    writer = gguf.GGUFWriter(target, spec.architecture)
    if spec.alignment != 32:
        writer.add_custom_alignment(spec.alignment)
    _add_keys(writer, spec)
    _add_tokenizer(writer, spec.vocabulary)
    for weight in _weights(spec):
        kind = Kind[weight.type_name]
        values = _values(weight, spec)
        writer.add_tensor(weight.name, values, raw_dtype=None if kind in (Kind.F32, Kind.F16) else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if spec.files == 1:
        return target
    first = split_gguf(target, target.with_suffix(""), spec.files)
    target.unlink()
    return first


def _check(spec: TinySpec) -> None:
    if spec.architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {spec.architecture}")
    if spec.hidden % _HEAD or spec.vocabulary < 256 + len(_SPECIALS) or spec.layers <= spec.dense_layers:
        raise ValueError(f"sizes that do not go together: {spec}")
    for type_name, width in (
        (spec.expert_type, spec.hidden),
        (spec.down_type or spec.expert_type, spec.feed_forward),
    ):
        block, _ = gguf.GGML_QUANT_SIZES[Kind[type_name]]
        if type_name not in EXPERT_TYPES or width % block:
            raise ValueError(f"{type_name} cannot store rows of {width} elements")
    tensors = sum(1 for _ in _weights(spec))
    if not 1 <= spec.files <= tensors:
        raise ValueError(f"{tensors} tensors cannot be split into {spec.files} files")


# --- keys -------------------------------------------------------------------------------------------------------------


def _add_keys(writer: Any, spec: TinySpec) -> None:
    arch = spec.architecture
    whole: dict[str, int] = {
        "context_length": 2048,
        "embedding_length": spec.hidden,
        "block_count": spec.layers,
        "feed_forward_length": spec.feed_forward,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "expert_count": spec.experts,
        "expert_used_count": spec.top_k,
    }
    real: dict[str, float] = {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0}
    if arch in ("qwen3moe", "qwen2moe", "gpt-oss", "hy_v3", "deepseek2"):
        whole["expert_feed_forward_length"] = spec.feed_forward
    if arch in ("qwen3moe", "gpt-oss", "hy_v3"):
        whole["attention.key_length"] = whole["attention.value_length"] = _HEAD
    if arch in ("qwen2moe", "hy_v3"):
        whole["expert_shared_feed_forward_length"] = 2 * spec.feed_forward
    if arch == "gpt-oss":
        whole["attention.sliding_window"] = 16
    if arch in ("deepseek2", "hy_v3"):
        whole["expert_shared_count"] = 1
        whole["expert_gating_func"] = _SIGMOID_GATING
        real["expert_weights_scale"] = 1.5
        writer.add_bool(f"{arch}.expert_weights_norm", True)
        whole["leading_dense_block_count"] = spec.dense_layers
    if arch == "deepseek2":
        latent = _Latent.of(spec)
        whole |= {
            "attention.head_count_kv": 1,  # attention works on the latent, of which there is one
            "attention.q_lora_rank": latent.query,
            "attention.kv_lora_rank": latent.key_value,
            "attention.key_length": latent.key_value + latent.rope,
            "attention.value_length": latent.key_value,
            "attention.key_length_mla": latent.plain + latent.rope,
            "attention.value_length_mla": latent.value,
            "rope.dimension_count": latent.rope,
        }
        if spec.expert_groups:
            whole |= {"expert_group_count": spec.expert_groups, "expert_group_used_count": spec.expert_groups // 2}
    if spec.idle_layers:
        whole["nextn_predict_layers"] = spec.idle_layers
    writer.add_name(f"tiny {arch}")
    for key, number in whole.items():
        writer.add_uint32(f"{arch}.{key}", number)
    for key, value in real.items():
        writer.add_float32(f"{arch}.{key}", value)


def _add_tokenizer(writer: Any, vocabulary: int) -> None:
    letters = _byte_letters()
    tokens, kinds, merges = list(letters), [gguf.TokenType.NORMAL] * 256, []
    room = vocabulary - 256 - len(_SPECIALS)
    plain = [letter for letter in letters if letter.isascii() and letter.isalpha()]
    for number in range(min(room, len(plain) ** 2)):
        left, right = plain[number // len(plain)], plain[number % len(plain)]
        tokens.append(left + right)
        merges.append(f"{left} {right}")
    kinds += [gguf.TokenType.NORMAL] * len(merges)
    while len(tokens) < vocabulary - len(_SPECIALS):
        tokens.append(f"<unused{len(tokens)}>")
        kinds.append(gguf.TokenType.UNUSED)
    tokens += _SPECIALS
    kinds += [gguf.TokenType.CONTROL] * len(_SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or ["a b"])
    writer.add_bos_token_id(vocabulary - 2)
    writer.add_eos_token_id(vocabulary - 1)
    writer.add_pad_token_id(vocabulary - 2)
    writer.add_add_bos_token(False)


def _byte_letters() -> list[str]:
    """One printable character per byte, as byte-level BPE vocabularies spell them."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in shown else next(stand_ins)) for byte in range(256)]


# --- tensors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Latent:
    """Sizes of the latent attention of ``deepseek2``."""

    query: int
    key_value: int
    rope: int = 16
    plain: int = 32
    value: int = 32

    @classmethod
    def of(cls, spec: TinySpec) -> _Latent:
        return cls(query=max(32, spec.hidden // 64 * 32), key_value=64)


def _weights(spec: TinySpec) -> Iterator[_Weight]:
    yield _matrix(spec, "token_embd.weight", spec.vocabulary, spec.hidden, gain=math.sqrt(spec.hidden))
    for layer in range(spec.layers):
        prefix = f"blk.{layer}."
        yield _norm(prefix + "attn_norm.weight", spec.hidden)
        yield from (_latent_attention if spec.architecture == "deepseek2" else _attention)(spec, prefix)
        yield from (_dense if layer < spec.dense_layers else _mixture)(spec, prefix)
    yield _norm("output_norm.weight", spec.hidden)
    yield _matrix(spec, "output.weight", spec.vocabulary, spec.hidden, gain=3.0)


def _norm(name: str, width: int) -> _Weight:
    return _Weight(name, (width,))


def _bias(name: str, *shape: int) -> _Weight:
    return _Weight(name, shape, "F32", 0.1)


def _matrix(spec: TinySpec, name: str, rows: int, columns: int, *, gain: float = 1.0) -> _Weight:
    return _Weight(name, (rows, columns), spec.other_type, gain / math.sqrt(columns))


def _attention(spec: TinySpec, prefix: str) -> Iterator[_Weight]:
    arch, width, narrow = spec.architecture, spec.heads * _HEAD, spec.kv_heads * _HEAD
    for name, rows in (("attn_q", width), ("attn_k", narrow), ("attn_v", narrow)):
        yield _matrix(spec, f"{prefix}{name}.weight", rows, spec.hidden)
        if arch in ("qwen2moe", "gpt-oss"):
            yield _bias(f"{prefix}{name}.bias", rows)
    yield _matrix(spec, prefix + "attn_output.weight", spec.hidden, width)
    if arch in ("qwen3moe", "hy_v3"):
        yield _norm(prefix + "attn_q_norm.weight", _HEAD)
        yield _norm(prefix + "attn_k_norm.weight", _HEAD)
    if arch == "olmoe":
        yield _norm(prefix + "attn_q_norm.weight", width)
        yield _norm(prefix + "attn_k_norm.weight", narrow)
    if arch == "gpt-oss":
        yield _bias(prefix + "attn_output.bias", spec.hidden)
        yield _bias(prefix + "attn_sinks.weight", spec.heads)


def _latent_attention(spec: TinySpec, prefix: str) -> Iterator[_Weight]:
    latent, heads = _Latent.of(spec), spec.heads
    yield _matrix(spec, prefix + "attn_q_a.weight", latent.query, spec.hidden)
    yield _norm(prefix + "attn_q_a_norm.weight", latent.query)
    yield _matrix(spec, prefix + "attn_q_b.weight", heads * (latent.plain + latent.rope), latent.query)
    yield _matrix(spec, prefix + "attn_kv_a_mqa.weight", latent.key_value + latent.rope, spec.hidden)
    yield _norm(prefix + "attn_kv_a_norm.weight", latent.key_value)
    for name, rows, columns in (
        ("attn_k_b", latent.key_value, latent.plain),
        ("attn_v_b", latent.value, latent.key_value),
    ):
        yield _Weight(f"{prefix}{name}.weight", (heads, rows, columns), spec.other_type, columns**-0.5)
    yield _matrix(spec, prefix + "attn_output.weight", spec.hidden, heads * latent.value)


def _feed_forward(spec: TinySpec, prefix: str, suffix: str, width: int) -> Iterator[_Weight]:
    yield _matrix(spec, f"{prefix}ffn_gate{suffix}.weight", width, spec.hidden)
    yield _matrix(spec, f"{prefix}ffn_down{suffix}.weight", spec.hidden, width)
    yield _matrix(spec, f"{prefix}ffn_up{suffix}.weight", width, spec.hidden)


def _dense(spec: TinySpec, prefix: str) -> Iterator[_Weight]:
    yield _norm(prefix + "ffn_norm.weight", spec.hidden)
    yield from _feed_forward(spec, prefix, "", spec.feed_forward)


def _mixture(spec: TinySpec, prefix: str) -> Iterator[_Weight]:
    arch, hidden, width, experts = spec.architecture, spec.hidden, spec.feed_forward, spec.experts
    rows = {"down": hidden, "gate": width, "up": width}
    if arch == "hy_v3":
        rows = {"down": hidden, "gate_up": 2 * width}
    # By name, which is the order in which llama.cpp's own quantiser writes them, and not the order of execution.
    for role in sorted(rows):
        down = role == "down"
        kind = spec.down_type if down and spec.down_type else spec.expert_type
        columns = width if down else hidden
        yield _Weight(f"{prefix}ffn_{role}_exps.weight", (experts, rows[role], columns), kind, 1.5 / math.sqrt(columns))
        if arch == "gpt-oss":
            yield _bias(f"{prefix}ffn_{role}_exps.bias", experts, rows[role])
    yield _Weight(prefix + "ffn_gate_inp.weight", (experts, hidden), "F32", 2 / math.sqrt(hidden))
    yield _norm(prefix + ("post_attention_norm.weight" if arch == "gpt-oss" else "ffn_norm.weight"), hidden)
    if arch == "gpt-oss":
        yield _bias(prefix + "ffn_gate_inp.bias", experts)
    if arch == "qwen2moe":
        yield _Weight(prefix + "ffn_gate_inp_shexp.weight", (hidden,), "F32", 1 / math.sqrt(hidden))
    if arch in ("qwen2moe", "hy_v3"):
        yield from _feed_forward(spec, prefix, "_shexp", 2 * width)
    if arch == "deepseek2":
        yield from _feed_forward(spec, prefix, "_shexp", width)
    if arch in ("deepseek2", "hy_v3"):
        yield _bias(prefix + ("exp_probs_b.bias" if arch == "deepseek2" else "exp_probs_b"), experts)


# --- values -----------------------------------------------------------------------------------------------------------


def _values(weight: _Weight, spec: TinySpec) -> npt.NDArray[Any]:
    rng = np.random.default_rng([spec.seed, zlib.crc32(weight.name.encode())])
    if weight.spread == 0.0:
        return 1 + 0.1 * rng.standard_normal(weight.shape, dtype=np.float32)
    fill = _RANDOM_BLOCKS.get(weight.type_name)
    if fill is not None:
        block, nbytes = gguf.GGML_QUANT_SIZES[Kind[weight.type_name]]
        blocks = rng.integers(0, 256, (math.prod(weight.shape) // block, nbytes), dtype=np.uint8)
        fill(blocks, weight.spread)
        return blocks.reshape(*weight.shape[:-1], -1)
    values = weight.spread * rng.standard_normal(weight.shape, dtype=np.float32)
    if spec.skew > 0 and weight.name.endswith("ffn_gate_inp.weight"):
        values *= 1 + spec.skew * rng.exponential(1.0, (weight.shape[0], 1)).astype(np.float32)
    if weight.type_name == "F32":
        return values
    if weight.type_name == "F16":
        return values.astype(np.float16)
    quantised: npt.NDArray[Any] = gguf.quants.quantize(values, Kind[weight.type_name])
    return quantised


def _half(value: float) -> npt.NDArray[np.uint8]:
    return np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)


# Any bytes are valid quants; only the scales of a block must be set, such that the values have the wanted spread. The
# divisors are the standard deviations of uniformly random quants times the random sub-scales of the type.


def _leading_scale(divisor: float) -> Callable[[npt.NDArray[np.uint8], float], None]:
    def fill(blocks: npt.NDArray[np.uint8], spread: float) -> None:
        blocks[:, :2] = _half(spread / divisor)

    return fill


def _scale_and_minimum(divisor: float, mean: float) -> Callable[[npt.NDArray[np.uint8], float], None]:
    def fill(blocks: npt.NDArray[np.uint8], spread: float) -> None:
        blocks[:, :2] = _half(spread / divisor)
        blocks[:, 2:4] = _half(spread / divisor * mean)

    return fill


def _trailing_scale(blocks: npt.NDArray[np.uint8], spread: float) -> None:
    blocks[:, -2:] = _half(spread / (73.9 * 18.5))


def _exponent(blocks: npt.NDArray[np.uint8], spread: float) -> None:
    blocks[:, 0] = 127 + round(math.log2(spread / 4.6)) + blocks[:, 0] % 2


_RANDOM_BLOCKS: Final[dict[str, Callable[[npt.NDArray[np.uint8], float], None]]] = {
    "Q8_0": _leading_scale(73.9),
    "Q4_0": _leading_scale(4.6),
    "IQ4_NL": _leading_scale(67.2),
    "Q4_K": _scale_and_minimum(259.0, 7.5),
    "Q5_K": _scale_and_minimum(528.0, 15.5),
    "Q6_K": _trailing_scale,
    "MXFP4": _exponent,
}
