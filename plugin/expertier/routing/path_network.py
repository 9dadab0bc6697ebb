"""The route path network in torch: only training needs it. :mod:`expertier.routing.path` computes the same in numpy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertier.routing.path import DECAYS, EPSILON, PathShape


class Recurrence(nn.Module):  # type: ignore[misc]
    """Gated linear recurrence over a token and its predecessor; the gates see no state, so training is parallel.

    Parameters
    ----------
    width : int
        Numbers per token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.mix = nn.Linear(2 * width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            # Memories from one token to some hundreds.
            self.mix.bias[:width] = torch.linspace(2.0, -4.0, width)
            self.out.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with what was remembered, shape ``(batch, tokens, width)``."""
        normed = functional.rms_norm(x, x.shape[-1:], self.norm, EPSILON)
        before = functional.pad(normed, (0, 0, 1, 0))[:, :-1]
        gate, value, outlet = self.mix(torch.cat((normed, before), -1)).float().chunk(3, -1)
        gate = gate.sigmoid()
        keep, given = (1.0 - gate).unbind(1), (gate * value).unbind(1)
        state = torch.zeros_like(given[0])
        states = []
        for kept, add in zip(keep, given, strict=True):
            state = torch.addcmul(add, kept, state)
            states.append(state)
        mixed: Tensor = x + self.out(torch.stack(states, 1) * functional.silu(outlet))
        return mixed


class PathNetwork(nn.Module):  # type: ignore[misc]
    """Token ids and the routes of earlier tokens to logits for all layers, now and soon.

    Parameters
    ----------
    shape : PathShape
        Sizes.
    """

    def __init__(self, shape: PathShape) -> None:
        super().__init__()
        self.shape = shape
        cells = shape.layers * shape.experts
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.recurrences = nn.ModuleList(Recurrence(shape.width) for _ in range(shape.depth))
        self.used = nn.Parameter(torch.randn(cells, shape.route_width) * 0.1)
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.inner = nn.Linear(shape.width + len(DECAYS) * shape.route_width, 2 * shape.inner)
        self.outer = nn.Linear(shape.inner, shape.width, bias=False)
        self.last_norm = nn.Parameter(torch.ones(shape.width))
        self.head = nn.Linear(shape.width, 3 * cells)
        self.soon_mix = nn.Parameter(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
        self.soon_bias = nn.Parameter(torch.zeros(3, cells))
        self.recent = nn.Parameter(torch.zeros(2, len(DECAYS), cells))
        with torch.no_grad():
            self.embedding.weight.normal_(0.0, 1.0)
            self.outer.weight.mul_(0.1)
            self.head.weight.mul_(0.5)

    def forward(self, tokens: Tensor, routes: Tensor, known: Tensor) -> Tensor:
        """Return logits.

        Parameters
        ----------
        tokens : Tensor of int64, shape (batch, tokens)
            Ids.
        routes : Tensor of float32, shape (batch, tokens, layers * experts)
            1 where a token used an expert.
        known : Tensor of float32, shape (batch, tokens, 1) or (batch, 1, 1)
            0 for tokens whose routes the predictor is not told.

        Returns
        -------
        Tensor of float32, shape (batch, tokens, 4, layers * experts)
            Now, and within each of the horizons.
        """
        x = self.embedding(tokens)
        for recurrence in self.recurrences:
            x = recurrence(x)
        recent = [decayed(routes * known, decay) for decay in DECAYS]
        normed = functional.rms_norm(x, x.shape[-1:], self.norm, EPSILON)
        told = [value @ self.used for value in recent]
        value, gate = self.inner(torch.cat((normed, *told), -1)).chunk(2, -1)
        x = x + self.outer(value * functional.silu(gate))
        u = functional.rms_norm(x, x.shape[-1:], self.last_norm, EPSILON)
        now, near, far = self.head(u).float().chunk(3, -1)
        for place, value in enumerate(recent):
            near = near + value * self.recent[0, place]
            far = far + value * self.recent[1, place]
        soon = [
            near * self.soon_mix[place, 0] + far * self.soon_mix[place, 1] + self.soon_bias[place] for place in range(3)
        ]
        return torch.stack((now, *soon), 2)


def decayed(routes: Tensor, decay: float) -> Tensor:
    """Average earlier tokens' routes with weights that fall by `decay` a token; a token does not see its own.

    Parameters
    ----------
    routes : Tensor, shape (batch, tokens, cells)
        What each token used.
    decay : float
        0 is the token before alone.
    """
    before = functional.pad(routes, (0, 0, 1, 0))[:, :-1]
    if not decay:
        return before
    # A convolution that is long enough, as a matrix over tokens: faster than a loop for windows of some hundreds.
    count = routes.shape[1]
    distance = torch.arange(count).unsqueeze(1) - torch.arange(count)
    weights = torch.where(distance >= 0, decay ** distance.clamp(min=0).float() * (1.0 - decay), 0.0)
    return weights @ before


def to_arrays(network: PathNetwork) -> dict[str, Any]:
    """Return the weights as float32 arrays, by the names :class:`expertier.routing.path.PathScorer` reads."""
    return {name: tensor.detach().float().numpy() for name, tensor in network.state_dict().items()}
