"""Every layer keeps some experts: which resident ones may leave then."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import FloatArray, IntArray


def spare_every_layer(
    layer_of: IntArray, resident: NDArray[np.bool_], floor: int, candidates: IntArray, scores: FloatArray
) -> NDArray[np.bool_]:
    """Mark the candidates that may all be evicted together and leave `floor` resident experts in every layer.

    Parameters
    ----------
    layer_of : ndarray of int64, shape (N,)
        Layer position of every expert.
    resident : ndarray of bool, shape (N,)
        Which are resident.
    floor : int
        Experts that each layer keeps.
    candidates : ndarray of int64, shape (n,)
        Experts that could leave, resident ones.
    scores : ndarray of float64, shape (n,)
        How much each deserves to stay; a layer keeps its best.

    Returns
    -------
    ndarray of bool, shape (n,)
        Those that may leave.
    """
    may_leave = np.zeros(len(candidates), bool)
    if not candidates.size:
        return may_leave
    layers = layer_of[candidates]
    order = np.lexsort((scores, layers))
    ordered = layers[order]
    first = np.searchsorted(ordered, ordered)  # where the layer begins
    surplus = np.bincount(layer_of[resident], minlength=int(layer_of[-1]) + 1) - floor
    may_leave[order] = np.arange(len(order)) - first < surplus[ordered]
    return may_leave
