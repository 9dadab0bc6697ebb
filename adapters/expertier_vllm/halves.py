"""A step that computes what is there while the rest still loads. Rounds differently, so for lossy steps only.

Stock's kernel sums a token's experts in one go. Here those that have arrived make one sum and the others a second one,
and both are added; a token that must be exact keeps its one sum and waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Stock's kernel: of hidden states, weights and ids of some tokens, what their experts give."""


def compute_in_halves(
    compute: Compute,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    late: NDArray[np.bool_],
    exact: NDArray[np.bool_] | None,
    wait: Callable[[], None],
) -> torch.Tensor:
    """Compute a layer's experts, those that are still loading last.

    Parameters
    ----------
    compute : callable
        The kernel.
    x : Tensor, shape (tokens, hidden)
        Hidden states.
    weights, ids : Tensor, shape (tokens, top_k)
        What is to be computed.
    late : ndarray of bool, shape (tokens, top_k)
        Which of `ids` are still loading.
    exact : ndarray of bool, shape (tokens,), or None
        Tokens whose result must be the kernel's own, bit by bit.
    wait : callable
        Blocks until everything has arrived.

    Returns
    -------
    Tensor, shape (tokens, hidden)
    """
    if exact is not None:
        late = late | (late.any(axis=1) & exact)[:, None]
    lacks = np.count_nonzero(late, axis=1)
    before, after = lacks < late.shape[1], lacks > 0
    if not before.any():
        wait()
        return compute(x, weights, ids)
    output = torch.empty_like(x)
    first, second = torch.from_numpy(np.flatnonzero(before)), torch.from_numpy(np.flatnonzero(after))
    output[first] = compute(x[first], *_only(weights[first], ids[first], ~late[before]))
    wait()
    rest = compute(x[second], *_only(weights[second], ids[second], late[after]))
    both = torch.from_numpy(before[after])
    output[second] = torch.where(both[:, None], output[second] + rest, rest)
    return output


def _only(weights: torch.Tensor, ids: torch.Tensor, counted: NDArray[np.bool_]) -> tuple[torch.Tensor, torch.Tensor]:
    """Let only some of each token's experts count: the others become one of these, which is in cache, at no weight."""
    if counted.all():
        return weights, ids
    mask = torch.from_numpy(counted)
    present = ids.gather(1, torch.from_numpy(counted.argmax(axis=1))[:, None])
    return weights * mask, torch.where(mask, ids, present)
