"""Selection among the router's scores with residency in mind: which experts stand in for absent ones.

Only the choice changes; gate weights stay the router's own, and the model renormalises them as it always does. What a
stand-in costs is told best by the gate weight it loses: preferring resident experts by a share of the range of logits
instead lost half as much again in KL divergence at equal loads.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expertier.errors import RouterScoresError, VirtualExpertsError
from expertier.residency.base import IntArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


def choose(
    scores: Floats, resident: Bools, routes: IntArray, weights: Floats, *, bias: float, protect: int = 0
) -> IntArray:
    """Choose experts for every token, preferring resident ones.

    An absent expert of the true routes is replaced by the best resident expert outside them whose score, raised by
    ``bias`` times the token's gate weight, is higher. That is the top-k of scores in which all resident experts are
    raised so, with ties going to the router's own choice.

    Parameters
    ----------
    scores : ndarray of float, shape (tokens, experts)
        What the router ranks by, on the scale of gate weights: probabilities, plus a correction where the model ranks
        by one; ``-inf`` for experts it may not choose (other groups).
    resident : ndarray of bool, shape (experts,)
        Experts that cost no load: resident ones, and where a wait is acceptable those on their way.
    routes : ndarray of int64, shape (tokens, top_k)
        The router's own choice, best first.
    weights : ndarray of float, shape (tokens, top_k)
        Gate weights of `routes` on the same scale: without a correction, before they are renormalised.
    bias : float
        Share of a token's gate weight (the sum of `weights`) that residency is worth: no stand-in loses more of it
        against the expert it stands in for. 0 changes nothing; infinite chooses resident experts only.
    protect : int
        So many of the first true experts are never replaced.

    Returns
    -------
    ndarray of int64, shape (tokens, top_k)
        Distinct experts. A substitute stands where the expert was that it replaces; tokens that keep all of theirs
        keep their order, so that their result is the stock engine's bit by bit. `routes` itself when nothing changes.

    Raises
    ------
    RouterScoresError
        When a score is NaN.
    VirtualExpertsError
        When `bias` is infinite and fewer experts are resident than a token needs.
    """
    if np.isnan(scores).any():
        raise RouterScoresError(
            "The router's scores are not numbers (NaN).", "The model or its input is broken; stock would go on with it."
        )
    absent = ~resident[routes]
    absent[:, :protect] = False
    if bias == 0 or not absent.any():
        return routes
    if len(routes) == 1:
        return _choose_for_one(scores[0], resident, routes[0], weights[0], absent[0], bias)[None]
    rows = np.arange(len(scores))[:, None]
    candidates = np.where(resident, scores, -np.inf)
    candidates[rows, routes] = -np.inf
    best = top_experts(candidates, routes.shape[1])
    # The worst absent expert meets the best candidate, the second worst the second best, and so on.
    stand_in = best[rows, absent[:, ::-1].cumsum(axis=1)[:, ::-1] - 1]
    offered = candidates[rows, stand_in]
    replaced = absent & (offered > -np.inf)
    if bias == np.inf:
        if (absent & ~replaced).any():
            raise _too_few(resident, routes.shape[1])
    else:
        replaced &= offered + bias * weights.sum(axis=1, keepdims=True) > scores[rows, routes]
    return np.where(replaced, stand_in, routes)


def _choose_for_one(
    scores: Floats, resident: Bools, routes: IntArray, weights: Floats, absent: Bools, bias: float
) -> IntArray:
    """What :func:`choose` does, of one token in a quarter of the time: nearly all of that is calls of numpy."""
    candidates = np.where(resident, scores, -np.inf)
    candidates[routes] = -np.inf
    worth = bias * weights.sum() if bias != np.inf else np.inf
    chosen = routes.copy()
    for place in np.flatnonzero(absent)[::-1].tolist():
        best = candidates.argmax()
        offered = candidates[best]
        if offered == -np.inf:
            if bias == np.inf:
                raise _too_few(resident, len(routes))
            break
        candidates[best] = -np.inf
        if offered + worth > scores[chosen[place]]:
            chosen[place] = best
    return chosen


def _too_few(resident: Bools, top_k: int) -> VirtualExpertsError:
    return VirtualExpertsError(
        f"Only {int(resident.sum())} experts are resident where a token needs {top_k}.",
        "Raise the budget, or use a finite bias.",
    )


def choose_together(
    scores: Floats, resident: Bools, routes: IntArray, weights: Floats, *, bias: float, protect: int = 0
) -> IntArray:
    """Choose experts for the tokens of one step, where what one of them brings in costs the others nothing.

    Against :func:`choose` fewer experts are replaced, and no other is loaded.

    Parameters
    ----------
    scores, resident, routes, weights, bias, protect
        As for :func:`choose`.

    Returns
    -------
    ndarray of int64, shape (tokens, top_k)
        As from :func:`choose`.
    """
    chosen = choose(scores, resident, routes, weights, bias=bias, protect=protect)
    if len(routes) == 1 or chosen is routes or resident[chosen].all():
        return chosen
    present = resident.copy()
    present[chosen] = True
    return choose(scores, present, routes, weights, bias=bias, protect=protect)


def top_experts(scores: Floats, top_k: int) -> IntArray:
    """The router's own choice, best first, the lower index first among equals; shape ``(tokens, top_k)``."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :top_k]


def close_groups(scores: Floats, *, groups: int, kept: int, rank_by: Literal["top2", "max"] = "top2") -> Floats:
    """Set the scores of all but the best groups of experts to ``-inf`` (grouped top-k, DeepSeek).

    Parameters
    ----------
    scores : ndarray of float, shape (tokens, experts)
        What the model ranks groups by.
    groups : int
        Number of groups, equally many neighbouring experts each.
    kept : int
        Groups that stay open.
    rank_by : {"top2", "max"}
        What a group is worth: the sum of its two best scores (DeepSeek-V3, llama.cpp) or its best (DeepSeek-V2).
    """
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, groups, experts // groups)
    worth = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2) if rank_by == "top2" else grouped.max(axis=2)
    open_groups = np.argsort(-worth, axis=1, kind="stable")[:, :kept]
    closed = np.ones((tokens, groups), bool)
    np.put_along_axis(closed, open_groups, False, axis=1)
    return np.where(closed[:, :, None], -np.inf, grouped).reshape(tokens, experts).astype(scores.dtype)
