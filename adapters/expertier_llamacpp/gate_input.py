"""Where a layer's router got its input from, found in llama.cpp's graph."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from expertier_llamacpp import ggml

_DEPTH = 32  # nodes between the router's multiplication and the chosen ids, generously


class GateInput:
    """Finds the input of a router from the node of its chosen ids."""

    def __init__(self) -> None:
        self._mul_mat = ggml.op_number("MUL_MAT")

    def of(self, node: int) -> NDArray[np.float32] | None:
        """Follow the graph back to the router's multiplication and return its input, shape ``(tokens, hidden)``.

        ``None`` when the router is not a multiplication of 32-bit floats, row after row.
        """
        for _ in range(_DEPTH):
            tensor = ggml.Tensor.from_address(node)
            if tensor.op == self._mul_mat:
                source = ggml.Tensor.from_address(tensor.src[1])
                width, tokens = source.ne[0], source.ne[1]
                if source.type != 0 or source.nb[1] != 4 * width:  # GGML_TYPE_F32
                    return None
                values = (ctypes.c_float * (tokens * width)).from_address(source.data)
                return np.frombuffer(values, np.float32).reshape(tokens, width)
            parent = tensor.view_src or tensor.src[0]
            if not parent:
                return None
            node = parent
        return None
