"""Which loads to begin now for the rest of a step, and in which order."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

LEAST_CHANCE: Final = 0.5
"""Below it a load ahead more often takes a slot and device time than it saves a wait."""
DOUBTFUL_CHANCE: Final = 0.3
"""The same where the device would idle otherwise: time on it costs nothing then, only the slot does."""


def plan_loads(
    chances: NDArray[np.floating],
    absent: NDArray[np.bool_],
    *,
    most: int,
    least: float = LEAST_CHANCE,
    doubtful: int = 0,
    least_doubtful: float = DOUBTFUL_CHANCE,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose and order loads for the layers still to come.

    Parameters
    ----------
    chances : ndarray of float, shape (layers, experts)
        Chance that the step uses each expert, the layer whose turn is next first.
    absent : ndarray of bool, shape (layers, experts)
        Experts that are neither resident nor under way.
    most : int
        Loads to begin at most.
    least : float
        Chance below which nothing is loaded as long as the device is busy.
    doubtful : int
        Loads that keep it busy until the next layer: when fewer are likely, those with at least `least_doubtful`
        follow, up to so many in all.
    least_doubtful : float
        The chance from which something is loaded then.

    Returns
    -------
    rows, experts : ndarray of int64, shape (n,)
        Which, in order.

    Notes
    -----
    Loads take the same time and are served one after the other, so the one needed first goes first: if that order
    misses a turn, every order does. Among those of a layer the likeliest goes first, because it is the surest to be
    waited for. A load that is not begun now can be begun at the next layer, with more knowledge; the device only has
    to be kept busy until then. Doubtful ones go by their chances, because few of them are begun.
    """
    if most <= 0:
        nothing = np.empty(0, np.int64)
        return nothing, nothing
    rows, experts = np.nonzero(absent & (chances >= least))
    order = np.lexsort((-chances[rows, experts], rows))[:most]
    rows, experts = rows[order], experts[order]
    if len(rows) >= min(doubtful, most):
        return rows, experts
    more, others = np.nonzero(absent & (chances >= least_doubtful) & (chances < least))
    order = np.argsort(-chances[more, others], kind="stable")[: min(doubtful, most) - len(rows)]
    return np.concatenate([rows, more[order]]), np.concatenate([experts, others[order]])
