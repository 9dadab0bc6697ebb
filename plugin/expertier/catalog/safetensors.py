"""Hugging Face checkpoints in safetensors files: where each expert lies.

Experts come in two layouts. One by one, every matrix of every expert is a tensor
(``model.layers.3.mlp.experts.7.gate_proj.weight``) and its place is anywhere; fused, a tensor holds the matrix of all
experts of a layer (``model.layers.3.mlp.experts.gate_up_proj``). What belongs to an expert's matrix (scales, zero
points, biases) counts as part of it in both.

- :func:`read_safetensors` returns the :class:`~expertier.catalog.types.Catalog` of a mixture of experts;
- :func:`build_catalog` makes it of headers that :func:`~expertier.catalog.safetensors_header.read_layout` has read;
- :func:`content_digest` tells checkpoints apart whose headers are the same.

Only headers are read; no file stays open or mapped. Neither torch nor the safetensors package is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from expertier.catalog.files import read_ranges
from expertier.catalog.safetensors_config import CHECK_FILES, CheckpointConfig
from expertier.catalog.safetensors_header import CheckpointLayout, StoredTensor, read_layout
from expertier.catalog.types import EXECUTION_ORDER, ROLE_SETS, Catalog, ExpertPart, LayerExperts, PartRole, Piece
from expertier.errors import ModelFormatError, NotMoEError, UnsupportedModelError

__all__ = ["build_catalog", "content_digest", "read_layout", "read_safetensors"]

_IN_LAYER: Final = re.compile(r"(?P<stack>(?:\w+\.)*?)(?:layers|blocks|h)\.(?P<layer>\d{1,6})\.(?P<rest>.+)", re.ASCII)
_BLOCK: Final = r"(?P<block>(?:\w+\.)*?)"
_ONE_BY_ONE: Final = re.compile(_BLOCK + r"experts\.(?P<expert>\d{1,6})\.(?P<matrix>\w+)\.(?P<tail>\w+)", re.ASCII)
_FUSED: Final = re.compile(
    _BLOCK
    + r"(?:experts\.(?P<matrix>gate_up_proj|gate_proj|up_proj|down_proj|w13|w1|w2|w3)"
    + r"|block_sparse_moe\.(?P<linear>input_linear|output_linear))(?:[._](?P<tail>\w+))?",
    re.ASCII,
)
_UNDER_EXPERTS: Final = re.compile(r"(?:\w+\.)*?experts\..*", re.ASCII | re.DOTALL)
_ROLES: Final[Mapping[str, PartRole]] = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "output_linear": "down",
    "gate_up_proj": "gate_up",
    "gate_and_up_proj": "gate_up",
    "w13": "gate_up",
    "input_linear": "gate_up",
}
# How the matrix itself is called; everything else beside it belongs to it.
_MATRIX_TAILS: Final = ("", "weight", "qweight", "weight_packed", "blocks")

_DRAFT_STACK: Final = re.compile(r"(?:\w+\.)*mtp(?:_\w+)?\.", re.ASCII)

_SAMPLE_BYTES: Final = 64
_SAMPLED_EXPERTS: Final = 16
_STOCK: Final = "Run it with the stock engine."


def read_safetensors(path: str | os.PathLike[str]) -> Catalog:
    """Find every routed expert of a Hugging Face checkpoint.

    Parameters
    ----------
    path : path
        The directory, or its ``config.json``, its index or a weight file in it.

    Returns
    -------
    Catalog
        Experts by layer. Shared experts, routers and dense layers count as ``other_bytes``; layers for multi-token
        prediction are left out.

    Raises
    ------
    ModelNotFoundError
        The directory, its configuration, or a file that its index names is missing or cannot be read.
    ModelFormatError
        A file is damaged or truncated, or index, configuration and files contradict each other.
    NotMoEError
        The model has no routed experts.
    UnsupportedModelError
        Its weights are not in safetensors files, or its experts are stored in a way that cannot be managed.
    """
    return build_catalog(read_layout(path))


def build_catalog(layout: CheckpointLayout) -> Catalog:
    """Find every routed expert in headers that were read before.

    Parameters
    ----------
    layout : CheckpointLayout
        What :func:`~expertier.catalog.safetensors_header.read_layout` returned.

    Returns
    -------
    Catalog
        As of :func:`read_safetensors`.

    Raises
    ------
    ModelFormatError, NotMoEError, UnsupportedModelError
        As for :func:`read_safetensors`.
    """
    config = CheckpointConfig(layout)
    found: dict[int, _LayerTensors] = {}
    other_bytes = 0
    for tensor, spot in _spots(layout, config):
        if spot is None:
            other_bytes += tensor.nbytes
        else:
            found.setdefault(spot.layer, _LayerTensors(spot.layer)).add(spot, tensor)
    if not found:
        _refuse_without_experts(layout, config)
    layers = []
    for layer in sorted(found):
        built, unclaimed = found[layer].assemble(layout, config)
        layers.append(built)
        other_bytes += unclaimed
    return Catalog(
        path=layout.directory,
        files=tuple(file.path for file in layout.files),
        format="safetensors",
        architecture=config.architecture,
        layers=tuple(layers),
        block_count=config.block_count,
        file_bytes=sum(file.size for file in layout.files),
        other_bytes=other_bytes,
        fingerprint=_fingerprint(layout),
    )


def content_digest(layout: CheckpointLayout) -> str:
    """Digest over a few bytes of the tensors, to tell checkpoints apart whose headers are the same.

    The fingerprint of a catalog covers headers, sizes and the configuration; two fine-tunes of one model can agree in
    those. Whoever keeps a converted copy of weights should compare this too. Reads 64 bytes from the middle of each
    tensor; of tensors that hold many experts from several places, of experts stored one by one from some of them.

    Parameters
    ----------
    layout : CheckpointLayout
        What :func:`~expertier.catalog.safetensors_header.read_layout` returned.

    Returns
    -------
    str
        Hex digest.

    Raises
    ------
    ModelNotFoundError, ModelFormatError
        A file can no longer be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in layout.files:
        ranges = [place for tensor in file.tensors for place in _samples(tensor)]
        for piece in read_ranges(file.path, file.size, ranges):
            digest.update(piece)
    return digest.hexdigest()


def _samples(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    inside = _IN_LAYER.fullmatch(tensor.name)
    single = _ONE_BY_ONE.fullmatch(inside["rest"]) if inside else None
    if single and int(single["expert"]) % _SAMPLED_EXPERTS and int(single["expert"]) >= _SAMPLED_EXPERTS:
        return  # a model has up to a hundred thousand such tensors
    places = _SAMPLED_EXPERTS if len(tensor.shape) > 2 else 1
    for place in range(places):
        start = tensor.nbytes * (2 * place + 1) // (2 * places) // _SAMPLE_BYTES * _SAMPLE_BYTES
        if start < tensor.nbytes:
            yield tensor.offset + start, min(_SAMPLE_BYTES, tensor.nbytes - start)


def _fingerprint(layout: CheckpointLayout) -> str:
    # No path, no time stamp: a copied model is the same model. A header holds the tensor table.
    digest = hashlib.blake2b(json.dumps(dict(layout.config), sort_keys=True).encode(), digest_size=16)
    for file in layout.files:
        digest.update(struct.pack("<Q", file.size))
        digest.update(bytes.fromhex(file.header_digest))
    return digest.hexdigest()


# ---- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spot:
    """What the name of an expert's tensor says."""

    layer: int
    block: str
    role: PartRole
    expert: int | None  # None: all experts
    tail: str  # weight, weight_scale, ...; empty for a fused matrix without one


def _spots(layout: CheckpointLayout, config: CheckpointConfig) -> Iterator[tuple[StoredTensor, _Spot | None]]:
    """Yield every tensor that an engine loads, with its place among the experts if it belongs to one."""
    stacks: dict[str, str] = {}
    for file in layout.files:
        for tensor in file.tensors:
            inside = _IN_LAYER.fullmatch(tensor.name)
            if _DRAFT_STACK.match(tensor.name):
                continue
            if inside is None:
                yield tensor, None
                continue
            layer = int(inside["layer"])
            if config.block_count <= layer < config.block_count + config.draft_layers:
                continue
            spot = _spot(layout, tensor, layer, inside["rest"])
            if spot is not None:
                stacks.setdefault(inside["stack"], tensor.name)
                if layer >= config.block_count:
                    raise ModelFormatError(
                        f"{layout.directory} has experts in layer {layer}, but {config.path.name} says that there are "
                        f"{config.block_count} layers.",
                        CHECK_FILES,
                    )
            yield tensor, spot
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{layout.directory} has experts in several stacks of layers: {', '.join(sorted(stacks.values())[:3])}.",
            _STOCK,
        )


def _spot(layout: CheckpointLayout, tensor: StoredTensor, layer: int, rest: str) -> _Spot | None:
    single = _ONE_BY_ONE.fullmatch(rest)
    if single is not None and single["matrix"] in _ROLES:
        expert = int(single["expert"])
        return _Spot(layer, single["block"], _ROLES[single["matrix"]], expert, single["tail"])
    fused = _FUSED.fullmatch(rest)
    if fused is not None:
        role = _ROLES[fused["matrix"] or fused["linear"]]
        return _Spot(layer, fused["block"], role, None, fused["tail"] or "")
    if len(tensor.shape) > 1 and _UNDER_EXPERTS.fullmatch(rest):
        raise UnsupportedModelError(
            f"{layout.directory}: tensor '{tensor.name:.200}' belongs to experts in a way that is not known here.",
            _STOCK,
        )
    return None


# ---- layers ----------------------------------------------------------------------------------------------------------


class _LayerTensors:
    """The tensors of the experts of one layer, until all are known."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.blocks: set[str] = set()
        self.fused: dict[PartRole, dict[str, StoredTensor]] = defaultdict(dict)
        self.single: dict[PartRole, dict[int, dict[str, StoredTensor]]] = defaultdict(lambda: defaultdict(dict))

    def add(self, spot: _Spot, tensor: StoredTensor) -> None:
        self.blocks.add(spot.block)
        into = self.fused[spot.role] if spot.expert is None else self.single[spot.role][spot.expert]
        if spot.tail in into:  # experts.7 and experts.07 are different names of one expert
            raise ModelFormatError(f"{tensor.file}: '{tensor.name:.200}' is there more than once.", CHECK_FILES)
        into[spot.tail] = tensor

    def assemble(self, layout: CheckpointLayout, config: CheckpointConfig) -> tuple[LayerExperts, int]:
        """Return the layer, and the bytes of tensors that turned out to belong to no single expert."""
        where = f"{layout.directory}: layer {self.layer}"
        roles = set(self.fused) | set(self.single)
        both = set(self.fused) & set(self.single)
        if both or len(self.blocks) > 1 or frozenset(roles) not in ROLE_SETS:
            raise UnsupportedModelError(
                f"{where} has the expert matrices {', '.join(sorted(roles))} in {len(self.blocks)} places"
                f"{', some both fused and one by one' if both else ''}; gate, up and down, or gate_up and down, or up "
                "and down in one place are needed.",
                CHECK_FILES,
            )
        unclaimed = 0
        parts = []
        for role in EXECUTION_ORDER:
            if role in self.fused:
                part, rest = self._fused_part(where, role, config)
                unclaimed += rest
                parts.append(part)
            elif role in self.single:
                parts.append(self._single_part(where, role, config))
        counts = {part.experts for part in parts}
        if len(counts) > 1:
            found = ", ".join(f"{part.role} {part.experts}" for part in parts)
            raise ModelFormatError(f"{where}: the matrices disagree on the number of experts: {found}.", CHECK_FILES)
        experts = counts.pop()
        config.check_experts(self.layer, experts)
        top_k = config.top_k_of(self.layer, experts)
        return LayerExperts(layer=self.layer, experts=experts, top_k=top_k, parts=tuple(parts)), unclaimed

    def _fused_part(self, where: str, role: PartRole, config: CheckpointConfig) -> tuple[ExpertPart, int]:
        tensors = self.fused[role]
        matrix = _matrix_of(where, role, tensors)
        experts = matrix.shape[0] if len(matrix.shape) > 1 else 0
        if not experts or not matrix.nbytes or matrix.nbytes % experts:
            raise UnsupportedModelError(
                f"{where}: '{matrix.name:.200}' has shape {matrix.shape}; a matrix for every expert is needed.", _STOCK
            )
        companions = [tensor for tensor in tensors.values() if tensor is not matrix]
        mine = [t for t in companions if t.shape and t.shape[0] == experts and t.nbytes % experts == 0]
        tables = [matrix, *mine]
        scattered = tuple(
            tuple(
                Piece(file=t.file, offset=t.offset + expert * (t.nbytes // experts), nbytes=t.nbytes // experts)
                for t in tables
            )
            for expert in range(experts)
        )
        part = ExpertPart(
            name=matrix.name,
            layer=self.layer,
            role=role,
            file=matrix.file,
            offset=matrix.offset,
            expert_bytes=sum(table.nbytes for table in tables) // experts,
            experts=experts,
            type_name=_type_name(matrix, config),
            shape=matrix.shape,
            scattered=scattered if mine else None,
        )
        shared = sum(tensor.nbytes for tensor in companions) - sum(tensor.nbytes for tensor in mine)
        return part, shared

    def _single_part(self, where: str, role: PartRole, config: CheckpointConfig) -> ExpertPart:
        by_expert = self.single[role]
        absent = next((expert for expert in range(len(by_expert)) if expert not in by_expert), None)
        if absent is not None:
            raise ModelFormatError(
                f"{where} has no {role} matrix of expert {absent}, but one of expert {max(by_expert)}.", CHECK_FILES
            )
        matrices = [_matrix_of(where, role, by_expert[expert]) for expert in range(len(by_expert))]
        first = matrices[0]
        for expert, matrix in enumerate(matrices):
            if (matrix.dtype, matrix.shape) != (first.dtype, first.shape) or not matrix.nbytes:
                raise UnsupportedModelError(
                    f"{where}: the {role} matrix of expert {expert} is {matrix.dtype} {matrix.shape}, that of expert 0 "
                    f"{first.dtype} {first.shape}; experts must be alike.",
                    _STOCK,
                )
        scattered = []
        for expert, matrix in enumerate(matrices):
            companions = [tensor for tensor in by_expert[expert].values() if tensor is not matrix]
            scattered.append(
                tuple(Piece(file=t.file, offset=t.offset, nbytes=t.nbytes) for t in (matrix, *companions) if t.nbytes)
            )
        return ExpertPart(
            name=re.sub(r"(^|\.)experts\.0+\.", r"\1experts.*.", first.name),
            layer=self.layer,
            role=role,
            file=first.file,
            offset=first.offset,
            # Some quantisers leave out scales of experts that their calibration never met.
            expert_bytes=max(sum(piece.nbytes for piece in pieces) for pieces in scattered),
            experts=len(matrices),
            type_name=_type_name(first, config),
            shape=(len(matrices), *first.shape),
            scattered=tuple(scattered),
        )


def _matrix_of(where: str, role: PartRole, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    found = [tensors[tail] for tail in _MATRIX_TAILS if tail in tensors]
    if len(found) != 1:
        raise ModelFormatError(
            f"{where}: {len(found)} of the tensors {', '.join(sorted(t.name for t in tensors.values())[:5])} can be "
            f"the {role} matrix.",
            CHECK_FILES,
        )
    return found[0]


def _type_name(matrix: StoredTensor, config: CheckpointConfig) -> str:
    """Storage type; packed in integers, the name of the quantisation says more."""
    packed = matrix.dtype[0] in "UI" and config.quant_method
    return config.quant_method.upper() if packed else matrix.dtype


def _refuse_without_experts(layout: CheckpointLayout, config: CheckpointConfig) -> None:
    key, value = config.experts
    if isinstance(value, list) or (type(value) is int and value > 1):
        raise UnsupportedModelError(
            f"{layout.directory} ({config.architecture}) should have experts ({key} is {value!r:.100}), but none of "
            "its tensors has a name that is known here.",
            _STOCK,
        )
    raise NotMoEError(
        f"{layout.directory} ({config.architecture}) is a dense model: it has no routed experts to offload.", _STOCK
    )
