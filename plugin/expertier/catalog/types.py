"""Where every expert's bytes are, independent of file format and engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

PartRole = Literal["gate", "up", "down", "gate_up"]

EXECUTION_ORDER: Final[tuple[PartRole, ...]] = ("gate_up", "gate", "up", "down")
ROLE_SETS: Final = (
    frozenset({"gate", "up", "down"}),
    frozenset({"gate_up", "down"}),
    frozenset({"up", "down"}),  # experts without a gate matrix
)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes of one expert that lie side by side.

    Attributes
    ----------
    file : Path
        The file that holds them.
    offset : int
        Byte offset in `file`.
    nbytes : int
        Number of bytes.
    """

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """One weight matrix of all experts of one layer.

    Attributes
    ----------
    name : str
        Tensor name in the model file, e.g. ``blk.3.ffn_up_exps.weight``.
    layer : int
        Index of the transformer layer.
    role : {"gate", "up", "down", "gate_up"}
        Which matrix of the expert this is.
    file : Path
        The file that holds expert 0 (a model may be split over several).
    offset : int
        Byte offset in `file` of expert 0.
    expert_bytes : int
        Bytes of one expert.
    experts : int
        Number of experts in the tensor.
    type_name : str
        Storage type, e.g. ``F16``, ``Q4_K``, ``MXFP4``.
    shape : tuple of int
        Engine order of dimensions (GGUF: ``(columns, rows, experts)``, safetensors: experts first).
    padded_bytes : int or None
        Distance from one expert to the next in `file`, where experts are padded; ``None``: they lie side by side.
    scattered : tuple of tuple of Piece, or None
        For each expert its pieces, the matrix first, where experts have no common distance or are more than one
        piece (a scale of its own); ``None``: every expert is one piece at ``offset + e * stride``.
    """

    name: str
    layer: int
    role: PartRole
    file: Path
    offset: int
    expert_bytes: int
    experts: int
    type_name: str
    shape: tuple[int, ...]
    padded_bytes: int | None = None
    scattered: tuple[tuple[Piece, ...], ...] | None = field(default=None, repr=False)

    @property
    def stride(self) -> int:
        """Distance from one expert to the next in the file: expert ``e`` lies at ``offset + e * stride``.

        Raises
        ------
        ValueError
            There is no such distance; ask :meth:`pieces`.
        """
        if self.scattered is not None:
            raise ValueError(f"the experts of {self.name} do not lie at a common distance")
        return self.expert_bytes if self.padded_bytes is None else self.padded_bytes

    def pieces(self, expert: int) -> tuple[Piece, ...]:
        """Return where the bytes of one expert lie, its matrix first, then what belongs to it (scales, biases)."""
        if self.scattered is not None:
            return self.scattered[expert]
        return (Piece(file=self.file, offset=self.offset + expert * self.stride, nbytes=self.expert_bytes),)


@dataclass(frozen=True, kw_only=True)
class LayerExperts:
    """The routed experts of one layer.

    Attributes
    ----------
    layer : int
        Index of the transformer layer.
    experts : int
        Number of routed experts.
    top_k : int
        Experts used per token.
    parts : tuple of ExpertPart
        In the order in which the engine multiplies them (``gate``, ``up``, ``down`` or ``gate_up``, ``down``).
    """

    layer: int
    experts: int
    top_k: int
    parts: tuple[ExpertPart, ...]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, all parts together."""
        return sum(part.expert_bytes for part in self.parts)

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts of the layer."""
        return self.expert_bytes * self.experts


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Every routed expert of a model and what surrounds them.

    Attributes
    ----------
    path : Path
        What an engine is told to load: a GGUF file (the first one of a split model), or the directory of a checkpoint.
    files : tuple of Path
        All files with weights, in split order.
    format : str
        ``gguf`` or ``safetensors``.
    architecture : str
        Architecture as the model names it, e.g. ``qwen3moe``; of a checkpoint its model type.
    layers : tuple of LayerExperts
        Layers that have routed experts, ascending; dense layers are left out.
    block_count : int
        Number of transformer layers that a forward pass computes, dense ones included.
    file_bytes : int
        Size of all files together.
    other_bytes : int
        Bytes of all tensors that are not routed experts (they stay in memory).
    idle_experts : tuple of str
        Names of expert tensors that no forward pass computes with: those of layers that predict further tokens
        (multi-token prediction). They are left on storage.
    fingerprint : str
        Hex digest over sizes, headers and configuration; changes when the model does. Reads no expert data.
    """

    path: Path
    files: tuple[Path, ...]
    format: str
    architecture: str
    layers: tuple[LayerExperts, ...]
    block_count: int
    file_bytes: int
    other_bytes: int
    fingerprint: str
    idle_experts: tuple[str, ...] = ()

    @cached_property
    def by_layer(self) -> dict[int, LayerExperts]:
        """Layer index to its experts."""
        return {layer.layer: layer for layer in self.layers}

    @property
    def expert_count(self) -> int:
        """Number of routed experts over all layers."""
        return sum(layer.experts for layer in self.layers)

    @property
    def total_expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(layer.total_bytes for layer in self.layers)

    @property
    def largest_expert_bytes(self) -> int:
        """Bytes of the largest expert of any layer."""
        return max(layer.expert_bytes for layer in self.layers)

    def smallest_budget(self, tokens: int = 1) -> int:
        """Bytes that the largest working set of one layer can need for a step of `tokens` tokens."""
        return max(min(layer.experts, tokens * layer.top_k) * layer.expert_bytes for layer in self.layers)
