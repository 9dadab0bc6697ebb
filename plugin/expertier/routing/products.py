"""Products of a matrix and a vector in the calling thread alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def times(matrix: Array, vector: Array) -> Any:
    """Multiply a matrix, shape ``(m, n)``, with a vector ``(n,)`` or every row of ``(k, n)``; ``(m,)`` or ``(k, m)``.

    OpenBLAS wakes its threads for some ten thousand numbers, and those spin for up to 25 ms where the engine wants to
    compute: a tenth of a decode step of the 4.8 GB reference model on two cores. What is multiplied here has to come
    from memory anyway, which is as quick like this.
    """
    return np.einsum("ij,...j->...i", matrix, vector)
