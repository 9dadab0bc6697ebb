"""Where the path network starts from: counts, so that it knows the token-id table before it has learnt anything.

The log-odds of the table are factored by a singular value decomposition into an embedding and a head. The rest of the
embedding comes from the model's own, which knows what tokens mean. What is left to learn is the context.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertier.routing.path_network import PathNetwork
from expertier.routing.predictor import HORIZONS
from expertier.routing.table import TokenCounts, count_tokens
from expertier.routing.windows import Windows

_MOST_TOKENS = 8192  # of the vocabulary: the rest is rare
_TRUST = 2.0  # sightings at which a token counts as much as the frequencies
_FAR_SHARE = 0.6  # of what is known of the next token that holds for those after it


def start_from_counts(
    network: PathNetwork, learn: Windows, here: TokenCounts, embedding: NDArray[np.float32] | None
) -> None:
    """Set embedding, heads and biases.

    Parameters
    ----------
    network : PathNetwork
        As it was made.
    learn : Windows
        To count what comes one token later.
    here : TokenCounts
        What its tokens use.
    embedding : ndarray of float32, shape (vocabulary, hidden), or None
        The model's.
    """
    shape = network.shape
    cells = shape.layers * shape.experts
    after = count_tokens(learn, shape.vocabulary, later=1)
    frequent = np.argsort(-here.seen, kind="stable")[:_MOST_TOKENS]
    seen = torch.from_numpy(here.seen[frequent].astype(np.float32))
    now, near = _odds(here, frequent, cells), _odds(after, frequent, cells)
    most = 2 * shape.width // 3 if embedding is not None else shape.width
    weights = seen.clamp(max=100.0).sqrt()[:, None]
    axes = torch.svd_lowrank(weights * now, q=min(most, cells, len(frequent)), niter=4)[2]
    from_counts = axes.shape[1]
    found = torch.randn(shape.vocabulary, shape.width, generator=torch.Generator().manual_seed(0)) * 0.1
    found[:, :from_counts] = 0.0
    found[frequent, :from_counts] = _scaled(now @ axes, seen)
    if embedding is not None:
        own = _principal(torch.from_numpy(embedding).float(), shape.width - from_counts)
        found[: len(own), from_counts : from_counts + own.shape[1]] = own[: len(found)]
    network.embedding.weight.copy_(found)
    inputs = found[frequent]
    inputs = inputs / inputs.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()
    weighted = inputs * seen[:, None]
    normal = weighted.T @ inputs + (0.01 * float(seen.sum()) / shape.width) * torch.eye(shape.width)
    heads = torch.linalg.solve(normal, weighted.T @ torch.cat((now, near), 1)).T
    network.head.weight.copy_(torch.cat((heads, _FAR_SHARE * heads[cells:])))
    share = torch.from_numpy(learn.frequency().ravel()).clamp(1e-4, 1 - 1e-4)
    network.head.bias[:cells] = torch.logit(share)
    network.head.bias[cells:] = 0.0
    for place, horizon in enumerate(HORIZONS):
        network.soon_bias[place] = torch.logit((1.0 - (1.0 - share) ** horizon).clamp(1e-4, 1 - 1e-4))


def _odds(counts: TokenCounts, tokens: NDArray[np.int64], cells: int) -> Tensor:
    """Log-odds of each expert for each token, above those over all tokens, shape ``(len(tokens), cells)``."""
    table = np.zeros((len(tokens), cells), np.float32)
    for row, token in enumerate(tokens.tolist()):
        entries = slice(int(counts.starts[token]), int(counts.starts[token + 1]))
        table[row, counts.cells[entries]] = counts.counts[entries]
    share = np.clip(counts.frequency.ravel(), 1e-4, 1 - 1e-4)
    chance = (table + _TRUST * share) / (counts.seen[tokens, None] + _TRUST)
    odds = np.log(chance / np.maximum(1.0 - chance, 1e-4)) - np.log(share / (1.0 - share))
    return torch.from_numpy(np.clip(odds, -4.0, 4.0).astype(np.float32))


def _scaled(x: Tensor, weights: Tensor) -> Tensor:
    mean = (x.pow(2).mean(-1) * weights).sum() / weights.sum()
    return x / mean.sqrt()


def _principal(embedding: Tensor, width: int) -> Tensor:
    """Reduce the model's embedding to its principal axes, with a mean square of a half."""
    rows = embedding / embedding.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    _, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    found = rows @ axes.flip(1)[:, :width]
    return found * (0.5 / found.pow(2).mean()).sqrt()
