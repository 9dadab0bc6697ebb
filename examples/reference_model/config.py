"""The shape of the reference model, and of any checkpoint of the same architecture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from expertier.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Shape of a Qwen3-MoE whose every layer is sparse and whose output head is the embedding.

    Field names are those of the Hugging Face ``config.json``.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    router_aux_loss_coef: float = 0.005

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of ``config.json``."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **dataclasses.asdict(self),
            # Only dense layers would read it, and there are none.
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_scaling": None,
            "use_sliding_window": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def from_hf(cls, folder: Path) -> ReferenceConfig:
        """Read ``config.json`` of a checkpoint folder.

        Raises
        ------
        ModelNotFoundError
            There is no ``config.json``.
        ModelFormatError
            It is not JSON or lacks a field.
        UnsupportedModelError
            Another architecture, dense layers, an output head of its own, or biases.
        """
        path = folder / "config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            config = cls(**{field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found})
            missing = [
                field.name
                for field in dataclasses.fields(cls)
                if field.name not in found and field.name != "rope_theta"
            ]
        except OSError as error:
            raise ModelNotFoundError(
                f"{path} cannot be read ({error.strerror}).", "Name a Hugging Face folder."
            ) from error
        except (ValueError, AttributeError) as error:
            raise ModelFormatError(f"{path} is not a model configuration: {error}.") from error
        # transformers 5 moves rope_theta into a group.
        if "rope_theta" not in found:
            theta = (found.get("rope_parameters") or {}).get("rope_theta")
            if theta is None:
                missing.append("rope_theta")
            else:
                config = dataclasses.replace(config, rope_theta=theta)
        if missing:
            raise ModelFormatError(f"{path} lacks {', '.join(missing)}.")
        expected = {"model_type": "qwen3_moe", "tie_word_embeddings": True, "norm_topk_prob": True}
        odd = [f"{key}={found.get(key)!r}" for key, value in expected.items() if found.get(key) != value]
        odd += [
            f"{key}={found[key]!r}" for key in ("attention_bias", "mlp_only_layers", "rope_scaling") if found.get(key)
        ]
        if odd:
            raise UnsupportedModelError(
                f"{path} is not of the reference architecture ({', '.join(odd)}).",
                "It must be a Qwen3-MoE with tied embeddings, normalised top-k, no dense layers and no biases.",
            )
        return config

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of all layers."""
        return self.num_hidden_layers * self.num_experts * 3 * self.hidden_size * self.moe_intermediate_size

    def widened(self, factor: int) -> ReferenceConfig:
        """Return the shape after repeating every intermediate unit `factor` times."""
        return dataclasses.replace(self, moe_intermediate_size=self.moe_intermediate_size * factor)
