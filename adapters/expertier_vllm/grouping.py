"""Token groups: what a step does whose working set is larger than the whole budget.

Stock's kernel sums a token's experts in one go, so splitting a step by experts would round differently. Splitting it by
tokens does not: every token is computed by one call with all its experts present.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

_SERVED: Final = 1 << 30  # more experts than a token can lack


def token_groups(
    routes: NDArray[np.int64], capacity: int, resident: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Split a step's tokens so that the experts of every group fit.

    Parameters
    ----------
    routes : ndarray of int64, shape (tokens, top_k)
        Routes of the layer.
    capacity : int
        Most experts of a group; at least `top_k`.
    resident : ndarray of bool, shape (experts,)
        Experts that need no load; the tokens that need no others come first.

    Yields
    ------
    tokens : ndarray of int64, shape (n,)
        Tokens of the group, ascending; every token is in exactly one group.
    wanted : ndarray of int64, shape (m,)
        Their experts, ascending, at most `capacity`.
    """
    needs = np.zeros((len(routes), len(resident)), bool)
    needs[np.arange(len(routes))[:, None], routes] = True
    left = np.ones(len(routes), bool)
    inside = resident.copy()
    while left.any():
        group = left & ~(needs & ~inside).any(axis=1)
        inside = np.asarray(needs[group].any(axis=0))
        if int(inside.sum()) > capacity:
            group[:] = False
            inside[:] = False
        left &= ~group
        lacks = np.where(left, (needs & ~inside).sum(axis=1), _SERVED)
        room = capacity - int(inside.sum())
        # Greedily: the token that adds the fewest experts, and with it all that need no others.
        while lacks[token := int(lacks.argmin())] <= room:
            added = needs[token] & ~inside
            inside[added] = True
            room -= int(added.sum())
            lacks -= needs[:, added].sum(axis=1)
            served = lacks <= 0
            group |= served
            left &= ~served
            lacks[served] = _SERVED
        yield np.flatnonzero(group), np.flatnonzero(inside)
