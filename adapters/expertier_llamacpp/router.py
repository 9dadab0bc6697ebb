"""What a router ranked its experts by, found in llama.cpp's graph.

Upstream: ``llm_graph_context::build_moe_ffn`` (src/llama-graph.cpp). The chosen ids are a view of the sorted ids of all
experts, and those are made of nothing but the scores. At the stop after the view, the next node in the graph gathers
the gate weights by these ids from the unbiased probabilities, and all multiplications by experts use the same ids: who
writes other ids into the view changes the choice and leaves the rest to the model. Nothing else reads the sorted ids.

The scores' memory is still intact at that stop, because it is given to another node at the earliest when one comes
that was not computed yet. That of logits under a softmax may not be: llama.cpp computes a softmax in place.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from expertier.errors import UnsupportedModelError
from expertier_llamacpp import ggml

ARCHITECTURES: Final = frozenset({"qwen3moe", "olmoe", "llama", "qwen2moe", "deepseek2", "gpt-oss", "hy_v3"})
"""Architectures whose routers are known to be of this kind; tests look at what each of them computes."""

_F32: Final = 0  # Upstream: GGML_TYPE_F32
_SIGMOID: Final = 7  # Upstream: GGML_UNARY_OP_SIGMOID
_DEPTH: Final = 12  # nodes between the sorted ids and the probabilities, generously

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class _Source:
    """Where scores lie; probabilities of 0 mean that scores are logits and the weights a softmax of the chosen ones."""

    scores: int
    probabilities: int


class RouterScores:
    """Reads a router's scores and gate weights at the stop after its top-k."""

    def __init__(self) -> None:
        self._sorted = ggml.op_number("ARGSORT")
        self._softmax = ggml.op_number("SOFT_MAX")
        self._unary = ggml.op_number("UNARY")
        self._add = ggml.op_number("ADD")
        self._mul_mat = ggml.op_number("MUL_MAT")
        # Closing groups of experts copies the scores of open ones into a tensor of minus infinity.
        self._through = frozenset(ggml.op_number(name) for name in ("RESHAPE", "VIEW", "SET_ROWS", "GET_ROWS"))

    def of(self, node: int, routes: NDArray[np.int64]) -> tuple[Scores, Scores]:
        """Return what a router ranked by and the gate weights of what it chose.

        Parameters
        ----------
        node : int
            Address of the node with the ids, just computed.
        routes : ndarray of int64, shape (tokens, top_k)
            Its contents.

        Returns
        -------
        scores : ndarray of float32, shape (tokens, experts)
            On the scale of gate weights, a correction included; ``-inf`` for experts of closed groups. Valid until the
            graph goes on.
        weights : ndarray of float32, shape (tokens, top_k)
            Without a correction, before any renormalisation over the chosen.

        Raises
        ------
        UnsupportedModelError
            When the graph is not as it is for the verified architectures.
        """
        source = self._find(node)
        scores = probabilities = _table(source.scores, len(routes))
        if not source.probabilities:
            scores = probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
        elif source.probabilities != source.scores:
            probabilities = _table(source.probabilities, len(routes))
        return scores, probabilities[np.arange(len(routes))[:, None], routes]

    def probabilities(self, node: int, routes: NDArray[np.int64]) -> Scores | None:
        """Return the router's probabilities of what it chose, shape ``(tokens, top_k)``, before any renormalisation.

        ``None`` for models that choose by logits (gpt-oss), and where the graph is not as it is for known ones.
        """
        try:
            source = self._find(node)
            if not source.probabilities:
                return None
            chosen: Scores = _table(source.probabilities, len(routes))[np.arange(len(routes))[:, None], routes]
        except UnsupportedModelError:
            return None
        return chosen

    def _find(self, node: int) -> _Source:
        ids = ggml.Tensor.from_address(node)
        order = ggml.Tensor.from_address(ids.view_src) if ids.view_src else None
        if order is None or order.op != self._sorted or ids.view_offs:
            raise _unknown("its chosen experts are no view of sorted ones")
        scores = address = order.src[0]
        for _ in range(_DEPTH):
            tensor = ggml.Tensor.from_address(address)
            if tensor.op in self._through:
                address = tensor.src[0]
                continue
            if self._gives_probabilities(tensor):
                return _Source(scores, address)
            if tensor.op == self._add:
                before = ggml.Tensor.from_address(tensor.src[0])
                if self._gives_probabilities(before):
                    return _Source(scores, tensor.src[0])  # ranked with a correction
                if before.op == self._mul_mat:
                    return _Source(scores, 0)
            if tensor.op == self._mul_mat:
                return _Source(scores, 0)
            break
        raise _unknown("its scores are computed in an unknown way")

    def _gives_probabilities(self, tensor: ggml.Tensor) -> bool:
        sigmoid = tensor.op == self._unary and tensor.op_params[0] == _SIGMOID
        return bool(tensor.op == self._softmax or sigmoid)


def write_ids(node: int, ids: NDArray[np.int64]) -> None:
    """Replace the ids in a top-k node, shape ``(tokens, top_k)``."""
    tensor = ggml.Tensor.from_address(node)
    for token, row in enumerate(ids.tolist()):
        (ctypes.c_int32 * len(row)).from_address(tensor.data + token * tensor.nb[1])[:] = row


def refuse_unknown(architecture: str) -> None:
    """Refuse architectures whose routers were not verified.

    Raises
    ------
    UnsupportedModelError
        With the names of those that were.
    """
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"Virtual experts are not verified with architecture {architecture!r} in llama.cpp.",
            f"Leave out the virtual_ options; verified are: {', '.join(sorted(ARCHITECTURES))}.",
        )


def _table(address: int, tokens: int) -> Scores:
    tensor = ggml.Tensor.from_address(address)
    experts = tensor.ne[0]
    if tensor.type != _F32 or tensor.ne[1] != tokens or tensor.nb[1] != 4 * experts or not tensor.data:
        raise _unknown("its scores do not lie as one row of floats for every token")
    flat = np.frombuffer((ctypes.c_float * (experts * tokens)).from_address(tensor.data), np.float32)
    return flat.reshape(tokens, experts)


def _unknown(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"A router of this model cannot be given virtual experts: {reason}.", "Leave out the virtual_ options."
    )
