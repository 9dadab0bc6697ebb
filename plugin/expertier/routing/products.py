"""Products in the calling thread alone.

OpenBLAS wakes its threads for some ten thousand numbers, and those spin for up to 25 ms where the engine wants to
compute: a tenth of a decode step of the 4.8 GB reference model on two cores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

_ALONE = 1 << 18
"""Multiplications that OpenBLAS does not share among threads."""
_FEW = 4  # vectors up to which blocks are no quicker: the matrix has to come from memory


def times(matrix: Array, vectors: Array) -> Any:
    """Multiply a matrix, shape ``(m, n)``, with a vector ``(n,)`` or every row of ``(k, n)``; ``(m,)`` or ``(k, m)``.

    A matrix that meets few vectors has to come from memory, which is as quick without BLAS.
    """
    if vectors.ndim == 2 and len(vectors) > _FEW:
        return pairs(vectors, matrix)
    return np.einsum("ij,...j->...i", matrix, vectors)


def pairs(left: Array, right: Array) -> NDArray[np.float32]:
    """Multiply every row of a matrix, shape ``(m, n)``, with every row of another, ``(k, n)``; float32 ``(m, k)``.

    In blocks that are small enough, up to a half slower than in one go.
    """
    width = max(1, left.shape[1])
    rows = max(1, min(len(left), math.isqrt(_ALONE // width)))
    columns = max(1, _ALONE // (width * rows))
    product = np.empty((len(left), len(right)), np.float32)
    for row in range(0, len(left), rows):
        for column in range(0, len(right), columns):
            block = product[row : row + rows, column : column + columns]
            np.matmul(left[row : row + rows], right[column : column + columns].T, out=block)
    return product
