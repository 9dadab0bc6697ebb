"""The reference model in plain torch: Qwen3-MoE with one matrix product per expert and step.

Written out because the general implementation in transformers spends most of a CPU's time around the arithmetic at
this size. A test holds it against that implementation.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.checkpoint import Checkpoint
from reference_model.config import ReferenceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What one forward pass gives.

    Attributes
    ----------
    hidden : Tensor
        Normalised last hidden states, shape ``(batch, tokens, hidden)``, float32.
    routes : Tensor
        Chosen experts, shape ``(layers, batch * tokens, experts per token)``, int64, the heaviest first.
    balance : Tensor
        Load-balance loss, mean over layers; 1 if all experts are used alike.
    """

    hidden: Tensor
    routes: Tensor
    balance: Tensor


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys, and rotary positions."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return the attention output, shape of `x`: ``(batch, tokens, hidden)``."""
        batch, tokens, _ = x.shape
        shape = (batch, tokens, -1, self.config.head_dim)
        q = _rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), cosine, sine)
        k = _rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), cosine, sine)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return projected


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


class Experts(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        count, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.router = nn.Linear(hidden, count, bias=False)
        # Gate and up in one matrix: half as many, twice as big products.
        self.gate_up = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(count, hidden, inner))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, routes and load-balance loss for tokens of shape ``(tokens, hidden)``."""
        count = self.router.out_features
        probabilities = functional.linear(x.float(), self.router.weight.float()).softmax(-1)
        weights, routes = probabilities.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)

        flat = routes.flatten()
        order = flat.argsort()
        loads = torch.bincount(flat, minlength=count)
        source = order // self.top_k
        gathered = torch.split(x.index_select(0, source), loads.tolist())
        outputs = []
        # unbind and not an index: the gradient of an index is as large as all experts, once for each of them.
        for tokens, gate_up, down in zip(
            gathered, self.gate_up.to(x.dtype).unbind(), self.down.to(x.dtype).unbind(), strict=True
        ):
            if len(tokens):
                gate, up = functional.linear(tokens, gate_up).chunk(2, -1)
                outputs.append(functional.linear(functional.silu(gate) * up, down))
        parts = torch.cat(outputs) * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        mixed = torch.zeros_like(x).index_add(0, source, parts)
        balance = count * (loads / len(flat) * probabilities.mean(0)).sum()
        return mixed, routes, balance


class Layer(nn.Module):
    """Attention and experts, each with its norm and residual."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.expert_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.experts = Experts(config)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, routes and load-balance loss."""
        x = x + self.attention(self.input_norm(x), cosine, sine)
        mixed, routes, balance = self.experts(self.expert_norm(x).flatten(0, 1))
        return x + mixed.view_as(x), routes, balance


class ReferenceModel(nn.Module):
    """The whole model; the embedding is the output head too."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def initialise(self, seed: int) -> None:
        """Fill all matrices with seeded random weights.

        What adds to the residual starts small, so that at first the embeddings are not drowned in noise.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            scale = 0.04 if "embedding" in name or "router" in name else parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down")):
                scale *= 0.1
            with torch.no_grad():
                parameter.normal_(0.0, scale, generator=generator)

    def forward(self, tokens: Tensor) -> Output:
        """Run tokens of shape ``(batch, tokens)``."""
        cosine, sine = _rotary(tokens.shape[1], self.config)
        x = self.embedding(tokens)
        routes, balances = [], []
        for layer in self.layers:
            x, chosen, balance = layer(x, cosine, sine)
            routes.append(chosen)
            balances.append(balance)
        return Output(hidden=self.norm(x), routes=torch.stack(routes), balance=torch.stack(balances).mean())

    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores over the vocabulary of hidden states."""
        return functional.linear(hidden, self.embedding.weight)


def _rotary(tokens: int, config: ReferenceConfig) -> tuple[Tensor, Tensor]:
    speeds = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), speeds).repeat(1, 2)
    return angles.cos(), angles.sin()


_ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def to_hf(model: ReferenceModel) -> dict[str, Tensor]:
    """Return the weights under the names transformers and vLLM know, still in float32."""
    inner = model.config.moe_intermediate_size
    found = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        prefix = f"model.layers.{index}."
        found[prefix + "input_layernorm.weight"] = layer.input_norm.weight
        found[prefix + "post_attention_layernorm.weight"] = layer.expert_norm.weight
        for name in _ATTENTION_NAMES:
            found[f"{prefix}self_attn.{name}.weight"] = getattr(layer.attention, name).weight
        found[prefix + "mlp.gate.weight"] = layer.experts.router.weight
        for expert in range(model.config.num_experts):
            own = f"{prefix}mlp.experts.{expert}."
            found[own + "gate_proj.weight"] = layer.experts.gate_up[expert, :inner]
            found[own + "up_proj.weight"] = layer.experts.gate_up[expert, inner:]
            found[own + "down_proj.weight"] = layer.experts.down[expert]
    return {name: tensor.detach() for name, tensor in found.items()}


def load_model(checkpoint: Checkpoint) -> ReferenceModel:
    """Return a checkpoint as a torch model in float32, ready for evaluation."""
    model = ReferenceModel(checkpoint.config)
    with torch.no_grad():
        # The values of to_hf are views of the parameters.
        for name, view in to_hf(model).items():
            view.copy_(torch.from_numpy(checkpoint.tensor(name)))
    return model.eval()
