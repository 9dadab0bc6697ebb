"""Writes small mixture-of-experts checkpoints in Hugging Face form that a stock vLLM loads and decodes.

The routers of such models route almost uniformly: good for testing that every byte arrives, useless for measuring
caches. The same specification always gives the same files, and the values of a tensor depend on nothing but its name,
its shape and the seed. Neither torch nor transformers is needed to write one.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support import quantised
from support.raw_safetensors import Tensor, build

# gpt_oss stores its experts in MXFP4 as released, gpt_oss_bf16 as fine-tunes do.
FAMILIES: Final = (
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "deepseek_v2",
    "granitemoe",
    "gpt_oss",
    "gpt_oss_bf16",
)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIALS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MXFP4_BLOCK: Final = 32


@dataclass(frozen=True, kw_only=True)
class HfSpec:
    """What a small checkpoint looks like.

    Attributes
    ----------
    family : str
        One of `FAMILIES`.
    layers, experts, top_k : int
        Transformer layers (of ``deepseek_v2`` the first is dense), routed experts, experts per token.
    hidden, intermediate : int
        Width of the model and of one expert. With the defaults an expert's matrices in bf16 are 32768 bytes (gate
        and up) and 16384 bytes (down), and half of them still are multiples of 4096.
    head : int
        Elements of an attention head.
    vocabulary : int
        Number of tokens; at least 259.
    files : int
        Number of files to split the weights into; more than one comes with an index.
    seed : int
        Seed of all weights.
    experts_as : str
        How the experts of a family that stores them one by one are quantised, one of `quantised.FORMATS`; empty:
        not at all.
    """

    family: str = "qwen3_moe"
    layers: int = 3
    experts: int = 16
    top_k: int = 4
    hidden: int = 128
    intermediate: int = 64
    head: int = 32
    vocabulary: int = 320
    files: int = 1
    seed: int = 0
    experts_as: str = ""

    @property
    def dense_layers(self) -> int:
        """Leading layers without routed experts."""
        return 1 if self.family == "deepseek_v2" else 0

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden // self.head

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.heads if self.family == "olmoe" or self.heads % 2 else self.heads // 2

    @property
    def expert_groups(self) -> int:
        """Groups of experts of which half are open to a token; 1 without groups."""
        grouped = self.family == "deepseek_v2" and self.experts % 4 == 0 and self.top_k <= self.experts // 2
        return 4 if grouped else 1


@dataclass(frozen=True)
class _Weight:
    name: str
    shape: tuple[int, ...]
    spread: float  # standard deviation; 0 marks a norm (around 1)
    kind: str = "BF16"


def write_hf(directory: str | os.PathLike[str], spec: HfSpec) -> Path:
    """Write a checkpoint: configuration, weights and tokenizer.

    Parameters
    ----------
    directory : path
        Directory to write into; it is made if it is missing.
    spec : HfSpec
        What to write.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ValueError
        `spec` names something unknown or sizes that do not go together.
    """
    _check(spec)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    _write_json(target / "config.json", _config(spec))
    eos = spec.vocabulary - 1
    _write_json(target / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos - 2})
    _write_tokenizer(target, spec.vocabulary)
    tensors = [tensor for weight in _weights(spec) for tensor in _tensors(weight, spec)]
    if spec.files == 1:
        (target / "model.safetensors").write_bytes(build(tensors))
        return target
    run = -(-len(tensors) // spec.files)
    placed: dict[str, str] = {}
    for number in range(spec.files):
        name = f"model-{number + 1:05}-of-{spec.files:05}.safetensors"
        own = tensors[number * run : (number + 1) * run]
        (target / name).write_bytes(build(own))
        placed |= {tensor.name: name for tensor in own}
    size = sum(tensor.nbytes for tensor in tensors)
    _write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": placed})
    return target


def _check(spec: HfSpec) -> None:
    if spec.family not in FAMILIES:
        raise ValueError(f"unknown family {spec.family}")
    fits = spec.hidden % spec.head == 0 and spec.hidden % _MXFP4_BLOCK == 0 and spec.intermediate % _MXFP4_BLOCK == 0
    if not fits or spec.vocabulary < 256 + len(_SPECIALS) or spec.layers <= spec.dense_layers:
        raise ValueError(f"sizes that do not go together: {spec}")
    if not 1 <= spec.top_k <= spec.experts:
        raise ValueError(f"{spec.top_k} of {spec.experts} experts per token")
    tensors = sum(1 for _ in _weights(spec))
    if not 1 <= spec.files <= tensors:
        raise ValueError(f"{tensors} tensors cannot be split into {spec.files} files")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Latent:
    """Sizes of the latent attention of ``deepseek_v2``; kernels are built for those of the released models."""

    key_value: int = 512
    rope: int = 64
    plain: int = 128
    value: int = 128


def _config(spec: HfSpec) -> dict[str, Any]:
    common: dict[str, Any] = {
        "model_type": spec.family,
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": spec.vocabulary - 3,
        "eos_token_id": spec.vocabulary - 1,
        "num_experts_per_tok": spec.top_k,
        "intermediate_size": spec.intermediate,
    }
    config = common | _CONFIGS[spec.family](spec)
    if spec.experts_as:
        names = (weight.name for weight in _weights(spec) if len(weight.shape) == 2 and not _quantises(weight, spec))
        plain = [name.removesuffix(".weight") for name in names]
        config["quantization_config"] = quantised.configuration(spec.experts_as, plain)
    return config


def _qwen3(spec: HfSpec) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": spec.head,
        "num_experts": spec.experts,
        "moe_intermediate_size": spec.intermediate,
        "intermediate_size": 2 * spec.intermediate,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }


def _qwen2(spec: HfSpec) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": spec.experts,
        "moe_intermediate_size": spec.intermediate,
        "shared_expert_intermediate_size": 2 * spec.intermediate,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _mixtral(spec: HfSpec) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": spec.experts,
        "sliding_window": None,
    }


def _olmoe(spec: HfSpec) -> dict[str, Any]:
    return {"architectures": ["OlmoeForCausalLM"], "num_experts": spec.experts, "norm_topk_prob": False}


def _deepseek(spec: HfSpec) -> dict[str, Any]:
    latent = _Latent()
    groups = spec.expert_groups
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_key_value_heads": spec.heads,
        "n_routed_experts": spec.experts,
        "n_shared_experts": 2,
        "moe_intermediate_size": spec.intermediate,
        "intermediate_size": 2 * spec.intermediate,
        "first_k_dense_replace": spec.dense_layers,
        "moe_layer_freq": 1,
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": max(1, groups // 2),
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "q_lora_rank": None,
        "kv_lora_rank": latent.key_value,
        "qk_rope_head_dim": latent.rope,
        "qk_nope_head_dim": latent.plain,
        "v_head_dim": latent.value,
        "attention_bias": False,
    }


def _granite(spec: HfSpec) -> dict[str, Any]:
    return {
        "architectures": ["GraniteMoeForCausalLM"],
        "num_local_experts": spec.experts,
        "embedding_multiplier": 2.0,
        "attention_multiplier": spec.head**-0.5,
        "residual_multiplier": 0.8,
        "logits_scaling": 2.0,
    }


def _gpt_oss(spec: HfSpec) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": spec.head,
        "num_local_experts": spec.experts,
        "experts_per_token": spec.top_k,
        "sliding_window": 16,
        "swiglu_limit": 7.0,
        "layer_types": [kinds[layer % 2] for layer in range(spec.layers)],
        "attention_bias": True,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    }
    if spec.family == "gpt_oss":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return config


_CONFIGS: Final[dict[str, Callable[[HfSpec], dict[str, Any]]]] = {
    "qwen3_moe": _qwen3,
    "qwen2_moe": _qwen2,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek,
    "granitemoe": _granite,
    "gpt_oss": _gpt_oss,
    "gpt_oss_bf16": _gpt_oss,
}


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    letters = _byte_letters()
    tokens, merges = list(letters), []
    plain = [letter for letter in letters if letter.isascii() and letter.isalpha()]
    while len(tokens) < vocabulary - len(_SPECIALS):
        number = len(merges)
        pair = plain[number // len(plain)], plain[number % len(plain)]
        tokens.append("".join(pair))
        merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 2048,
            "bos_token": _SPECIALS[0],
            "eos_token": _SPECIALS[2],
            "pad_token": _SPECIALS[0],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _byte_letters() -> list[str]:
    """One printable character per byte, as byte-level BPE vocabularies spell them."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in shown else next(stand_ins)) for byte in range(256)]


# --- tensors ----------------------------------------------------------------------------------------------------------


def _weights(spec: HfSpec) -> Iterator[_Weight]:
    yield _Weight("model.embed_tokens.weight", (spec.vocabulary, spec.hidden), 1.0)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        yield _norm(prefix + "input_layernorm", spec.hidden)
        yield from (_latent_attention if spec.family == "deepseek_v2" else _attention)(spec, prefix + "self_attn.")
        yield _norm(prefix + "post_attention_layernorm", spec.hidden)
        if layer < spec.dense_layers:
            yield from _feed_forward(prefix + "mlp.", spec.hidden, 2 * spec.intermediate)
        else:
            yield from _mixture(spec, prefix)
    yield _norm("model.norm", spec.hidden)
    yield _matrix("lm_head", spec.vocabulary, spec.hidden, gain=3.0)


def _norm(name: str, width: int) -> _Weight:
    return _Weight(name + ".weight", (width,), 0.0)


def _bias(name: str, *shape: int) -> _Weight:
    return _Weight(name, shape, 0.1)


def _matrix(name: str, rows: int, columns: int, *, gain: float = 1.0) -> _Weight:
    return _Weight(name + ".weight", (rows, columns), gain / math.sqrt(columns))


def _attention(spec: HfSpec, prefix: str) -> Iterator[_Weight]:
    width, narrow = spec.heads * spec.head, spec.kv_heads * spec.head
    oss = spec.family.startswith("gpt_oss")
    for name, rows in (("q_proj", width), ("k_proj", narrow), ("v_proj", narrow)):
        yield _matrix(prefix + name, rows, spec.hidden)
        if oss or spec.family == "qwen2_moe":
            yield _bias(f"{prefix}{name}.bias", rows)
    yield _matrix(prefix + "o_proj", spec.hidden, width)
    if oss:
        yield _bias(prefix + "o_proj.bias", spec.hidden)
        yield _bias(prefix + "sinks", spec.heads)
    if spec.family == "qwen3_moe":
        yield _norm(prefix + "q_norm", spec.head)
        yield _norm(prefix + "k_norm", spec.head)
    if spec.family == "olmoe":
        yield _norm(prefix + "q_norm", width)
        yield _norm(prefix + "k_norm", narrow)


def _latent_attention(spec: HfSpec, prefix: str) -> Iterator[_Weight]:
    latent = _Latent()
    yield _matrix(prefix + "q_proj", spec.heads * (latent.plain + latent.rope), spec.hidden)
    yield _matrix(prefix + "kv_a_proj_with_mqa", latent.key_value + latent.rope, spec.hidden)
    yield _norm(prefix + "kv_a_layernorm", latent.key_value)
    yield _matrix(prefix + "kv_b_proj", spec.heads * (latent.plain + latent.value), latent.key_value)
    yield _matrix(prefix + "o_proj", spec.hidden, spec.heads * latent.value)


def _feed_forward(
    prefix: str, hidden: int, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[_Weight]:
    gate, up, down = names
    yield _matrix(prefix + gate, width, hidden, gain=1.5)
    yield _matrix(prefix + up, width, hidden, gain=1.5)
    yield _matrix(prefix + down, hidden, width, gain=1.5)


def _mixture(spec: HfSpec, prefix: str) -> Iterator[_Weight]:
    hidden, width, experts, family = spec.hidden, spec.intermediate, spec.experts, spec.family
    if family in ("mixtral", "granitemoe"):
        prefix += "block_sparse_moe."
    else:
        prefix += "mlp."
    if family == "granitemoe":
        yield _matrix(prefix + "router.layer", experts, hidden, gain=2.0)
        yield _Weight(prefix + "input_linear.weight", (experts, 2 * width, hidden), 1.5 / math.sqrt(hidden))
        yield _Weight(prefix + "output_linear.weight", (experts, hidden, width), 1.5 / math.sqrt(width))
        return
    if family.startswith("gpt_oss"):
        yield _matrix(prefix + "router", experts, hidden, gain=2.0)
        yield _bias(prefix + "router.bias", experts)
        yield from _fused_with_biases(spec, prefix + "experts.")
        return
    yield _matrix(prefix + "gate", experts, hidden, gain=2.0)
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for expert in range(experts):
        yield from _feed_forward(f"{prefix}experts.{expert}.", hidden, width, names)
    if family == "qwen2_moe":
        yield from _feed_forward(prefix + "shared_expert.", hidden, 2 * width)
        yield _matrix(prefix + "shared_expert_gate", 1, hidden)
    if family == "deepseek_v2":
        yield from _feed_forward(prefix + "shared_experts.", hidden, 2 * width)


def _fused_with_biases(spec: HfSpec, prefix: str) -> Iterator[_Weight]:
    for name, rows, columns in (
        ("gate_up_proj", 2 * spec.intermediate, spec.hidden),
        ("down_proj", spec.hidden, spec.intermediate),
    ):
        spread = 1.5 / math.sqrt(columns)
        if spec.family == "gpt_oss":
            blocks = columns // _MXFP4_BLOCK
            yield _Weight(f"{prefix}{name}_blocks", (spec.experts, rows, blocks, _MXFP4_BLOCK // 2), spread, "MXFP4")
            yield _Weight(f"{prefix}{name}_scales", (spec.experts, rows, blocks), spread, "E8M0")
        else:  # unquantised, the matrices are stored transposed
            yield _Weight(prefix + name, (spec.experts, columns, rows), spread)
        yield _bias(f"{prefix}{name}_bias", spec.experts, rows)


def _quantises(weight: _Weight, spec: HfSpec) -> bool:
    return bool(spec.experts_as) and ".experts." in weight.name


# --- values -----------------------------------------------------------------------------------------------------------


def _tensors(weight: _Weight, spec: HfSpec) -> Iterator[Tensor]:
    if _quantises(weight, spec):
        rows, columns = weight.shape
        name = weight.name.removesuffix(".weight")
        yield from quantised.matrix(spec.experts_as, name, rows, columns, weight.spread, spec.seed)
    else:
        yield _tensor(weight, spec)


def _tensor(weight: _Weight, spec: HfSpec) -> Tensor:
    rng = np.random.default_rng([spec.seed, zlib.crc32(weight.name.encode())])
    if weight.kind == "MXFP4":  # any bytes are valid pairs of numbers
        return Tensor(weight.name, "U8", weight.shape, rng.integers(0, 256, weight.shape, dtype=np.uint8).tobytes())
    if weight.kind == "E8M0":
        # Uniformly random quants have a standard deviation of 2.9; two neighbouring exponents around it.
        exponent = 127 + round(math.log2(weight.spread / 2.9))
        scales = rng.integers(exponent - 1, exponent + 1, weight.shape, dtype=np.uint8)
        return Tensor(weight.name, "U8", weight.shape, scales.tobytes())
    values = rng.standard_normal(weight.shape, dtype=np.float32)
    values = 1 + 0.1 * values if weight.spread == 0.0 else weight.spread * values
    return Tensor(weight.name, "BF16", weight.shape, _bfloat16(values).tobytes())


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)
