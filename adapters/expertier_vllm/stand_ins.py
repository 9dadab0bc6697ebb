"""Virtual experts in a batch: resident experts stand in for absent ones, with the router's own weights."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.virtual import VirtualExperts, top_experts
from expertier.virtual.selection import choose_together


class RouterScoring(Protocol):
    """A router's arithmetic, for experts it did not choose itself."""

    def scores(self, logits: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score all experts.

        Returns
        -------
        ranking : ndarray of float32, shape (tokens, experts)
            What experts are ranked by, on the scale of gate weights; ``-inf`` for those it may not choose.
        probabilities : ndarray of float32, shape (tokens, experts)
            Gate weights before renormalisation and scaling.
        """

    def weights(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The router's own weights of any experts, shape of `ids`."""


def stand_in(
    virtual: VirtualExperts,
    layer: int,
    resident: NDArray[np.bool_],
    scoring: RouterScoring,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    routes: NDArray[np.int64],
    exact: NDArray[np.bool_] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts a layer computes with.

    Parameters
    ----------
    virtual : VirtualExperts
        What is allowed.
    layer : int
        The layer.
    resident : ndarray of bool, shape (experts,)
        Experts that cost no load; changed in place.
    scoring : RouterScoring
        Its router.
    logits : Tensor, shape (tokens, experts)
        What the router was given.
    weights, ids : Tensor of float32 and int32, shape (tokens, top_k)
        What it chose, in any order.
    routes : ndarray of int64, shape (tokens, top_k)
        The same as `ids`.
    exact : ndarray of bool, shape (tokens,), or None
        Tokens that keep their experts. What they need is loaded whoever stands in, so others keep it, too.

    Returns
    -------
    weights, ids : Tensor
        The very tensors given when nothing is replaced; a token that keeps its experts keeps its weights bit by bit.
    """
    tokens = None
    if exact is not None:
        resident[routes[exact]] = True
        tokens = np.flatnonzero(~exact)
        routes = routes[tokens]
    if resident[routes].all():
        virtual.count(layer, routes)
        return weights, ids
    ranking, probabilities = scoring.scores(logits if tokens is None else logits[torch.from_numpy(tokens)])
    rows = np.arange(len(routes))[:, None]
    best_first = np.argsort(-ranking[rows, routes], axis=1, kind="stable")
    ordered = routes[rows, best_first]
    chosen = virtual.choose(layer, ordered, resident, lambda: (ranking, probabilities[rows, ordered]))
    if chosen is ordered:
        return weights, ids
    placed = np.empty_like(routes)
    placed[rows, best_first] = chosen
    changed = np.flatnonzero((placed != routes).any(axis=1))
    if len(changed) == len(ids):
        new_ids = torch.from_numpy(placed).to(ids.dtype)
        return scoring.weights(logits, new_ids).to(weights.dtype), new_ids
    of_changed = torch.from_numpy(changed if tokens is None else tokens[changed])
    new_ids, new_weights = ids.clone(), weights.clone()
    new_ids[of_changed] = torch.from_numpy(placed[changed]).to(ids.dtype)
    new_weights[of_changed] = scoring.weights(logits[of_changed], new_ids[of_changed]).to(weights.dtype)
    return new_weights, new_ids


def insisted(
    virtual: VirtualExperts,
    resident: NDArray[np.bool_],
    scoring: RouterScoring,
    logits: NDArray[np.float32],
    top_k: int,
    exact: NDArray[np.bool_] | None,
) -> NDArray[np.int64]:
    """Foresee which absent experts no stand-in is allowed for, from what the router will probably be given.

    Parameters
    ----------
    virtual, resident, scoring, exact
        As for :func:`stand_in`.
    logits : ndarray of float32, shape (tokens, experts)
        A guess at what the router will be given.
    top_k : int
        Experts per token.

    Returns
    -------
    ndarray of int64, shape (n,)
    """
    ranking, probabilities = scoring.scores(torch.from_numpy(logits))
    routes = top_experts(ranking, top_k)
    if resident[routes].all():
        return np.empty(0, np.int64)
    plain = probabilities[np.arange(len(routes))[:, None], routes]
    protect = virtual.settings.protect
    needed = choose_together(ranking, resident, routes, plain, bias=virtual.bias, protect=protect)
    if exact is not None:
        needed = np.where(exact[:, None], routes, needed)
    return np.unique(needed[~resident[needed]])
