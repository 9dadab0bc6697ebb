"""Router weights and token embedding of a model on storage: what predictors of routes start from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from expertier.catalog import gguf, safetensors_header
from expertier.catalog.files import read_ranges
from expertier.catalog.safetensors_header import StoredTensor
from expertier.catalog.types import Catalog

Weights = NDArray[np.float32]

# `mlp.gate` (Qwen, OLMoE, DeepSeek), `block_sparse_moe.gate` (Mixtral), `mlp.router` (gpt-oss).
_ROUTER: Final = re.compile(r"\blayers\.(\d+)\.(?:[a-z_]+\.)*(?:gate|router)\.weight$")
_NORM: Final = re.compile(r"\blayers\.(\d+)\.post_attention_layernorm\.weight$")
_EMBEDDING: Final = re.compile(r"\b(?:embed_tokens|word_embeddings|wte)\.weight$")


def read_routers(catalog: Catalog, layouts: Sequence[gguf.GgufLayout] | None = None) -> dict[int, Weights]:
    """Read the router weights of every layer.

    Parameters
    ----------
    catalog : Catalog
        The model.
    layouts : sequence of GgufLayout, optional
        Of a GGUF model, if its headers were read already.

    Returns
    -------
    dict of int to ndarray of float32, shape (experts, hidden)
        By layer; layers whose router has an unusual name are missing, and those of a checkpoint with an unusual type.

    Raises
    ------
    ModelFormatError
        A GGUF router has a type that cannot be decoded.
    """
    if catalog.format == "gguf":
        return _gguf_by_layer(catalog, layouts, ("ffn_gate_inp",))
    experts = {layer.layer: layer.experts for layer in catalog.layers}
    found: dict[int, Weights] = {}
    for tensor in _checkpoint_tensors(catalog):
        match = _ROUTER.search(tensor.name)
        if match and tensor.dtype in _DECODERS and tensor.shape[:1] == (experts.get(int(match[1])),):
            found[int(match[1])] = _decode(tensor)
    return found


def read_norms(catalog: Catalog, layouts: Sequence[gguf.GgufLayout] | None = None) -> dict[int, Weights]:
    """Read the weights of the norm before each router, by layer, shape ``(hidden,)``; as :func:`read_routers`."""
    if catalog.format == "gguf":
        return _gguf_by_layer(catalog, layouts, ("ffn_norm", "post_attention_norm"))
    layers = {layer.layer for layer in catalog.layers}
    found: dict[int, Weights] = {}
    for tensor in _checkpoint_tensors(catalog):
        match = _NORM.search(tensor.name)
        if match and tensor.dtype in _DECODERS and len(tensor.shape) == 1 and int(match[1]) in layers:
            found[int(match[1])] = _decode(tensor)
    return found


def read_embedding(catalog: Catalog) -> Weights | None:
    """Read the token embedding, shape ``(vocabulary, hidden)``; ``None`` where its name or type is unusual."""
    if catalog.format == "gguf":
        layouts = gguf.read_layout(catalog.path)
        if any(tensor.name == "token_embd.weight" for layout in layouts for tensor in layout.tensors):
            return gguf.read_tensor(layouts, "token_embd.weight")
        return None
    for tensor in _checkpoint_tensors(catalog):
        if _EMBEDDING.search(tensor.name) and tensor.dtype in _DECODERS and len(tensor.shape) == 2:
            return _decode(tensor)
    return None


def routers_digest(routers: Mapping[int, Weights], layers: tuple[int, ...]) -> str:
    """Return a digest of router weights that a conversion of the model does not change.

    Weights are taken as bfloat16, the coarsest type that routers are stored in, so that a checkpoint and what was
    converted, quantised or widened from it have the same digest.

    Parameters
    ----------
    routers : mapping of int to ndarray of float32, shape (experts, hidden)
        By layer.
    layers : tuple of int
        All layers with routed experts; empty is returned when the router of one is not known.
    """
    if any(layer not in routers for layer in layers):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for layer in layers:
        bits = np.ascontiguousarray(routers[layer], "<f4").view("<u4").astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2")
        digest.update(f"{layer}:{rounded.shape}".encode())
        digest.update(rounded.tobytes())
    return digest.hexdigest()


def _gguf_by_layer(
    catalog: Catalog, layouts: Sequence[gguf.GgufLayout] | None, names: Sequence[str]
) -> dict[int, Weights]:
    """The first tensor of these names that a layer has, for every layer that has one."""
    layouts = gguf.read_layout(catalog.path) if layouts is None else layouts
    present = {tensor.name for layout in layouts for tensor in layout.tensors}
    found: dict[int, Weights] = {}
    for layer in catalog.by_layer:
        for name in names:
            if (whole := f"blk.{layer}.{name}.weight") in present:
                found[layer] = gguf.read_tensor(layouts, whole)
                break
    return found


def _checkpoint_tensors(catalog: Catalog) -> list[StoredTensor]:
    layout = safetensors_header.read_layout(catalog.path)
    return [tensor for file in layout.files for tensor in file.tensors]


def _from_bf16(raw: bytes) -> Weights:
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float32)


_DECODERS: Final[Mapping[str, Callable[[bytes], Weights]]] = {
    "BF16": _from_bf16,
    "F16": lambda raw: np.frombuffer(raw, "<f2").astype(np.float32),
    "F32": lambda raw: np.frombuffer(raw, "<f4").astype(np.float32),
}


def _decode(tensor: StoredTensor) -> Weights:
    size = tensor.file.stat().st_size
    raw = read_ranges(tensor.file, size, [(tensor.offset, tensor.nbytes)])[0]
    return _DECODERS[tensor.dtype](raw).reshape(tensor.shape)
