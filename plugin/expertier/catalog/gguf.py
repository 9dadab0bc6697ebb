"""GGUF models, single or split: where each expert lies.

Three views of the same headers:

- :func:`read_gguf` returns the :class:`~expertier.catalog.types.Catalog` of a mixture of experts;
- :func:`read_layout` returns every tensor of every file;
- :func:`read_tensor` decodes one small tensor (a router, a norm) to ``float32``.

Only headers are read; no file stays open or mapped.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from expertier.catalog.files import read_ranges
from expertier.catalog.gguf_header import (
    GgufKey,
    GgufLayout,
    GgufTensor,
    KeyValue,
    read_header,
)
from expertier.catalog.types import EXECUTION_ORDER, ROLE_SETS, Catalog, ExpertPart, LayerExperts, PartRole
from expertier.errors import ModelFormatError, ModelNotFoundError, NotMoEError, UnsupportedModelError

__all__ = [
    "GgufKey",
    "GgufLayout",
    "GgufTensor",
    "build_catalog",
    "content_digest",
    "read_gguf",
    "read_layout",
    "read_tensor",
]

_EXPERT_TENSOR: Final = re.compile(r"blk\.(\d{1,6})\.ffn_(gate_up|gate|up|down)_exps\.weight")
_UNMERGED_EXPERT_TENSOR: Final = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_SPLIT_NAME: Final = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_ROLES: Final[tuple[PartRole, ...]] = get_args(PartRole)
# Storage types of activations, indices and other things that no engine multiplies with as an expert.
_NOT_WEIGHTS: Final = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
_SAMPLE_BYTES: Final = 64


def read_gguf(path: str | os.PathLike[str]) -> Catalog:
    """Find every routed expert of a GGUF model.

    Parameters
    ----------
    path : path
        A GGUF file; of a split model the first one.

    Returns
    -------
    Catalog
        Experts by layer. Shared experts, expert biases and scales, and dense layers count as ``other_bytes``.

    Raises
    ------
    ModelNotFoundError
        The file, or another file of a split model, is missing or cannot be read.
    ModelFormatError
        A file is not GGUF, damaged, truncated, or not the first of a split model.
    NotMoEError
        The model has no routed experts.
    UnsupportedModelError
        Its experts are stored in a way that cannot be managed.
    """
    return build_catalog(read_layout(path))


def read_layout(path: str | os.PathLike[str]) -> tuple[GgufLayout, ...]:
    """Read the headers of all files of a GGUF model, in split order.

    Parameters
    ----------
    path : path
        A GGUF file; of a split model the first one.

    Returns
    -------
    tuple of GgufLayout
        One per file.

    Raises
    ------
    ModelNotFoundError, ModelFormatError, UnsupportedModelError
        As for :func:`read_gguf`.
    """
    first = read_header(Path(path))
    count = _whole(first, "split.count", 1)
    if count <= 1:
        return (first,)
    named = _SPLIT_NAME.fullmatch(first.path.name)
    number = _whole(first, "split.no", 0)
    if number != 0:
        start = f"{named['prefix']}-00001-of-{count:05}.gguf" if named else "the one ending in -00001-of-..."
        raise ModelFormatError(
            f"{first.path} is file {number + 1} of {count} of a split model.", f"Name the first file: {start}."
        )
    if not named or int(named["number"]) != 1 or int(named["count"]) != count:
        raise ModelFormatError(
            f"{first.path} is the first of {count} files of a split model, but its name does not say so.",
            f"Rename the files to NAME-00001-of-{count:05}.gguf and so on, or merge them with llama-gguf-split.",
        )
    layouts = [first]
    for index in range(1, count):
        sibling = first.path.with_name(f"{named['prefix']}-{index + 1:05}-of-{count:05}.gguf")
        try:
            layout = read_header(sibling)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"{first.path.name} is the first of {count} files, and file {index + 1} is missing: {error.problem}",
                "Fetch the missing file into the same directory.",
            ) from error
        stated = (layout.metadata.get("split.no"), layout.metadata.get("split.count"))
        if stated != (index, count):
            raise ModelFormatError(
                f"{sibling} should have split.no {index} of split.count {count}, but has {stated[0]} of {stated[1]}.",
                "Put the files of one and the same model into the directory.",
            )
        layouts.append(layout)
    _check_split_table(layouts)
    return tuple(layouts)


def _check_split_table(layouts: Sequence[GgufLayout]) -> None:
    """Every tensor exactly once over all files, and as many as the first file announces."""
    first = layouts[0]
    holder: dict[str, Path] = {}
    for layout in layouts:
        for tensor in layout.tensors:
            if tensor.name in holder:
                raise ModelFormatError(
                    f"Tensor '{tensor.name}' is both in {holder[tensor.name].name} and in {layout.path.name}.",
                    "Put the files of one and the same model into the directory.",
                )
            holder[tensor.name] = layout.path
    announced = _whole(first, "split.tensors.count", len(holder))
    if announced != len(holder):
        raise ModelFormatError(
            f"The {len(layouts)} files of {first.path} hold {len(holder)} tensors; the first one says {announced}.",
            "Put the files of one and the same model into the directory.",
        )


def build_catalog(layouts: Sequence[GgufLayout]) -> Catalog:
    """Find every routed expert in headers that were read before.

    Parameters
    ----------
    layouts : sequence of GgufLayout
        What :func:`read_layout` returned.

    Returns
    -------
    Catalog
        As of :func:`read_gguf`.

    Raises
    ------
    ModelFormatError
        Keys that describe the experts are missing or contradict the tensors.
    NotMoEError
        The model has no routed experts.
    UnsupportedModelError
        The experts are stored in a way that cannot be managed.
    """
    first = layouts[0]
    architecture = first.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelFormatError(f"{first.path} does not name its architecture (key general.architecture).")
    block_count = _whole(first, f"{architecture}.block_count", 0)
    by_layer = _expert_parts(layouts)
    # Layers at the end that predict further tokens (multi-token prediction) are no part of a forward pass.
    computed = max(0, block_count - _whole(first, f"{architecture}.nextn_predict_layers", 0))
    idle = [part for layer in range(computed, block_count) for part in by_layer.pop(layer, {}).values()]
    if not by_layer:
        _refuse_without_experts(layouts, architecture)
    layers = tuple(
        _assemble_layer(first, architecture, layer, parts, block_count) for layer, parts in sorted(by_layer.items())
    )
    tensor_bytes = sum(tensor.nbytes for layout in layouts for tensor in layout.tensors)
    return Catalog(
        path=first.path,
        files=tuple(layout.path for layout in layouts),
        format="gguf",
        architecture=architecture,
        layers=layers,
        block_count=computed,
        file_bytes=sum(layout.size for layout in layouts),
        other_bytes=tensor_bytes
        - sum(layer.total_bytes for layer in layers)
        - sum(part.experts * part.expert_bytes for part in idle),
        fingerprint=_fingerprint(layouts),
        idle_experts=tuple(part.name for part in idle),
    )


def _expert_parts(layouts: Sequence[GgufLayout]) -> dict[int, dict[PartRole, ExpertPart]]:
    parts: dict[int, dict[PartRole, ExpertPart]] = defaultdict(dict)
    for layout in layouts:
        for tensor in layout.tensors:
            match = _EXPERT_TENSOR.fullmatch(tensor.name)
            if match is None:
                continue
            layer = int(match[1])
            role = next(role for role in _ROLES if role == match[2])
            if role in parts[layer]:  # blk.3 and blk.03 are different names of one layer
                raise ModelFormatError(f"{layout.path} has more than one ffn_{role}_exps tensor in layer {layer}.")
            parts[layer][role] = _as_part(layout, tensor, layer, role)
    return parts


def _as_part(layout: GgufLayout, tensor: GgufTensor, layer: int, role: PartRole) -> ExpertPart:
    where = f"{layout.path}: expert tensor '{tensor.name}'"
    if tensor.type_name in _NOT_WEIGHTS:
        raise UnsupportedModelError(
            f"{where} has type {tensor.type_name}, in which no weights are stored.",
            "Use a model quantised to a common type, e.g. Q4_K_M.",
        )
    shape = tensor.shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise UnsupportedModelError(
            f"{where} has shape {shape}; (columns, rows, experts) is needed.", "Convert the model with llama.cpp."
        )
    columns, rows, experts = (*shape, 1) if len(shape) == 2 else shape
    return ExpertPart(
        name=tensor.name,
        layer=layer,
        role=role,
        file=layout.path,
        offset=tensor.offset,
        expert_bytes=tensor.nbytes // experts,
        experts=experts,
        type_name=tensor.type_name,
        shape=(columns, rows, experts),
    )


def _assemble_layer(
    first: GgufLayout, architecture: str, layer: int, parts: Mapping[PartRole, ExpertPart], block_count: int
) -> LayerExperts:
    if layer >= block_count:
        raise ModelFormatError(
            f"{first.path} has experts in layer {layer}, but {architecture}.block_count is {block_count}."
        )
    if frozenset(parts) not in ROLE_SETS:
        raise UnsupportedModelError(
            f"{first.path}: layer {layer} has the expert tensors {', '.join(sorted(parts))}; "
            "gate, up and down, or gate_up and down, or up and down are needed.",
            "Convert the model again with a current llama.cpp.",
        )
    ordered = tuple(parts[role] for role in EXECUTION_ORDER if role in parts)
    counts = {part.experts for part in ordered}
    announced = _per_layer(first, f"{architecture}.expert_count", layer)
    if len(counts) > 1 or (announced is not None and announced not in counts):
        found = ", ".join(f"{part.role} {part.experts}" for part in ordered)
        stated = "" if announced is None else f" ({architecture}.expert_count is {announced})"
        raise UnsupportedModelError(
            f"{first.path}: the expert tensors of layer {layer} disagree on the number of experts: {found}{stated}.",
            "Convert the model again with a current llama.cpp.",
        )
    experts = ordered[0].experts
    top_k = _per_layer(first, f"{architecture}.expert_used_count", layer)
    if top_k is None or not 1 <= top_k <= experts:
        raise ModelFormatError(
            f"{first.path}: layer {layer} has {experts} experts, but {architecture}.expert_used_count is {top_k}.",
            "Convert the model again with a current llama.cpp.",
        )
    return LayerExperts(layer=layer, experts=experts, top_k=top_k, parts=ordered)


def _refuse_without_experts(layouts: Sequence[GgufLayout], architecture: str) -> None:
    path = layouts[0].path
    if any(_UNMERGED_EXPERT_TENSOR.fullmatch(tensor.name) for layout in layouts for tensor in layout.tensors):
        raise UnsupportedModelError(
            f"{path} stores every expert as a tensor of its own, a form of early Mixtral conversions.",
            "Convert the model again with a current llama.cpp, or fetch a newer conversion.",
        )
    raise NotMoEError(
        f"{path} ({architecture}) is a dense model: it has no routed experts to offload.",
        "Run it with the stock engine.",
    )


def _as_whole(layout: GgufLayout, key: str, value: KeyValue) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelFormatError(f"{layout.path}: key {key} is {value!r}, a whole number is needed.")
    return value


def _whole(layout: GgufLayout, key: str, default: int) -> int:
    return _as_whole(layout, key, layout.metadata.get(key, default))


def _per_layer(layout: GgufLayout, key: str, layer: int) -> int | None:
    """Return a whole number that may be given once or once per layer; None if it is not given."""
    value = layout.metadata.get(key)
    if value is None:
        return None
    if isinstance(value, tuple):
        if layer >= len(value):
            raise ModelFormatError(f"{layout.path}: key {key} has {len(value)} values, none for layer {layer}.")
        value = value[layer]
    return _as_whole(layout, key, value)


def _fingerprint(layouts: Sequence[GgufLayout]) -> str:
    # The header bytes contain the tensor table. No path, no time stamp: a copied model is the same model.
    digest = hashlib.blake2b(digest_size=16)
    for layout in layouts:
        digest.update(struct.pack("<QQ", layout.size, layout.data_offset))
        digest.update(bytes.fromhex(layout.header_digest))
    return digest.hexdigest()


def content_digest(layouts: Sequence[GgufLayout]) -> str:
    """Digest over a few bytes of every tensor, to tell models apart whose headers are the same.

    The fingerprint of a catalog covers headers and sizes only; two fine-tunes of one model can agree in those. Whoever
    keeps a converted copy of weights should compare this too. Reads 64 bytes from the middle of each tensor.

    Parameters
    ----------
    layouts : sequence of GgufLayout
        What :func:`read_layout` returned.

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
    for layout in layouts:
        wanted = [
            (tensor.offset + tensor.nbytes // 2 // _SAMPLE_BYTES * _SAMPLE_BYTES, _SAMPLE_BYTES, tensor)
            for tensor in layout.tensors
        ]
        ranges = [(start, min(length, tensor.offset + tensor.nbytes - start)) for start, length, tensor in wanted]
        for piece in read_ranges(layout.path, layout.size, ranges):
            digest.update(piece)
    return digest.hexdigest()


def read_tensor(layout: GgufLayout | Sequence[GgufLayout], name: str) -> npt.NDArray[np.float32]:
    """Read one tensor and decode it; meant for small ones such as ``blk.0.ffn_gate_inp.weight``.

    Parameters
    ----------
    layout : GgufLayout or sequence of GgufLayout
        The file that holds the tensor, or all files of the model.
    name : str
        Name of the tensor.

    Returns
    -------
    ndarray of float32
        In numpy's order of dimensions (slowest first): a router has shape ``(experts, hidden)``.

    Raises
    ------
    ModelFormatError
        There is no such tensor, or the file has become shorter.
    ModelNotFoundError
        The file can no longer be read.
    UnsupportedModelError
        The storage type of the tensor cannot be decoded here.
    """
    layouts = (layout,) if isinstance(layout, GgufLayout) else tuple(layout)
    found = next(((one, tensor) for one in layouts for tensor in one.tensors if tensor.name == name), None)
    if found is None:
        raise ModelFormatError(f"{layouts[0].path} has no tensor '{name}'.")
    holder, tensor = found
    raw = np.frombuffer(read_ranges(holder.path, holder.size, [(tensor.offset, tensor.nbytes)])[0], dtype=np.uint8)
    return _decode(holder, tensor, raw).reshape(tensor.shape[::-1])


def _decode(layout: GgufLayout, tensor: GgufTensor, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    if tensor.type_name == "F32":
        return raw.view("<f4").astype(np.float32)
    if tensor.type_name == "F16":
        return raw.view("<f2").astype(np.float32)
    # Imported here: it takes a tenth of a second and most users of a catalog never decode anything.
    import gguf

    try:
        decoded = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(tensor.type_id))
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedModelError(
            f"{layout.path}: tensor '{tensor.name}' of type {tensor.type_name} cannot be decoded here.",
            "Use a model whose routers are stored as F32, F16, BF16 or a common quantised type.",
        ) from error
    return decoded.astype(np.float32, copy=False)
