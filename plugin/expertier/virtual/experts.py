"""Virtual experts as an adapter holds them: what is asked for, whom it applies to, and what it has cost so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from expertier.config import OffloadOptions
from expertier.errors import UnsupportedOptionError, VirtualExpertsError
from expertier.residency.base import IntArray
from expertier.virtual.selection import Bools, Floats, choose_together

_TINY = 1e-30  # no gate weight at all


@dataclass(frozen=True, kw_only=True)
class VirtualSettings:
    """What the user asked for.

    Attributes
    ----------
    bias : float
        Share of a token's gate weight that residency is worth; 0 is exact, infinite chooses among resident experts
        only.
    protect : int
        So many of a token's first experts are never replaced.
    prefill : bool
        Whether prompts may be computed with substitutes, too.
    """

    bias: float = 0.0
    protect: int = 0
    prefill: bool = False

    @classmethod
    def from_options(cls, options: OffloadOptions, *, top_k: int) -> VirtualSettings | None:
        """Read them from the one table; ``None`` when virtual experts were not asked for.

        Parameters
        ----------
        options : OffloadOptions
            What the user set.
        top_k : int
            Experts per token, the least of all layers.

        Raises
        ------
        UnsupportedOptionError
            For options that contradict each other.
        """
        hard = options.virtual_hard == "on"
        protect = options.virtual_protect or 0
        if hard and options.virtual_bias is not None:
            raise UnsupportedOptionError(
                "virtual_hard and virtual_bias contradict each other: a hard mask is an infinite bias.", "Give one."
            )
        if hard and protect:
            raise UnsupportedOptionError(
                "virtual_hard and virtual_protect contradict each other: a protected expert that is absent makes a "
                "step wait.",
                "Use virtual_bias instead of virtual_hard.",
            )
        if not hard and options.virtual_bias is None:
            if protect or options.virtual_prefill == "on":
                raise UnsupportedOptionError(
                    "virtual_protect and virtual_prefill do nothing without virtual_bias.", "Give virtual_bias, too."
                )
            return None
        if protect >= top_k:
            raise UnsupportedOptionError(
                f"virtual_protect={protect} protects all {top_k} experts of a token.", "Give a smaller number."
            )
        if options.trace is not None:
            raise UnsupportedOptionError(
                "A trace says how the exact model routes, so it is not recorded with virtual experts.",
                "Leave out trace, or virtual_bias.",
            )
        bias = math.inf if hard else float(options.virtual_bias or 0)
        return cls(bias=bias, protect=protect, prefill=options.virtual_prefill == "on")

    def check_groups(self, groups: int) -> None:
        """Refuse a hard mask over routers that choose among so many groups of experts first.

        Raises
        ------
        UnsupportedOptionError
            The bias is infinite, and there is more than one group.
        """
        if self.bias == math.inf and groups > 1:
            raise UnsupportedOptionError(
                "virtual_hard is not possible with routers that choose groups of experts first: in the chosen groups "
                "too few experts may be resident.",
                "Use virtual_bias.",
            )


@dataclass(frozen=True, kw_only=True)
class VirtualStats:
    """What substitution has done since the start.

    Attributes
    ----------
    bias : float
        The bias now.
    tokens : int
        Tokens computed while substitution was allowed.
    exact_tokens : int
        Tokens computed without: prompts, requests that asked for it, and steps at bias 0.
    layers : tuple of int
        Layer indices, the order of the following.
    substituted_share : tuple of float
        Share of the router's choices that were replaced, by layer.
    substituted_mass : tuple of float
        Mean share of a token's gate weights that belonged to replaced experts, by layer.
    """

    bias: float
    tokens: int
    exact_tokens: int
    layers: tuple[int, ...]
    substituted_share: tuple[float, ...]
    substituted_mass: tuple[float, ...]


class VirtualExperts:
    """Chooses stand-ins for a model's layers and counts them.

    Parameters
    ----------
    layers : sequence of int
        The model's MoE layers.
    settings : VirtualSettings
        What the user asked for.

    Attributes
    ----------
    settings : VirtualSettings
        As given; the bias in force is :attr:`bias`.
    tokens, exact_tokens : int
        As in :class:`VirtualStats`.
    wishes, substituted : ndarray of int64, shape (layers,)
        Experts the routers chose while substitution was allowed, and how many of those were replaced.
    mass : ndarray of float64, shape (layers,)
        Sum over tokens of the share of gate weights that belonged to replaced experts.
    stood_in : bool
        Whether anything was replaced since it was last set to False.
    after_step : callable or None
        Called with this object at the end of every step: who steers the bias.
    """

    def __init__(self, layers: Sequence[int], settings: VirtualSettings) -> None:
        self.settings = settings
        self._layers = tuple(sorted(layers))
        self._position = {layer: position for position, layer in enumerate(self._layers)}
        self.bias = settings.bias
        self.tokens = 0
        self.exact_tokens = 0
        self.wishes = np.zeros(len(self._layers), np.int64)
        self.substituted = np.zeros(len(self._layers), np.int64)
        self.mass = np.zeros(len(self._layers))
        self.stood_in = False
        self.after_step: Callable[[VirtualExperts], None] | None = None
        self._exact_requests = 0
        self._substituting = False

    @property
    def bias(self) -> float:
        """The bias in force from the next step on; may be set while the engine runs, from any thread.

        Raises
        ------
        VirtualExpertsError
            When set to a negative number or NaN, or turned infinite or finite: what is kept resident depends on it.
        """
        return self._bias

    @bias.setter
    def bias(self, value: float) -> None:
        value = float(value)
        if math.isnan(value) or value < 0:
            raise VirtualExpertsError(f"A bias of {value} is not possible.", "Give 0 (exact) or more.")
        if (value == math.inf) != (self.settings.bias == math.inf) and value:
            raise VirtualExpertsError(
                "The bias cannot turn infinite or finite while the engine runs.", "Load the model with the other."
            )
        self._bias = value

    @property
    def hard(self) -> bool:
        """Whether the model was loaded to choose among resident experts only."""
        return self.settings.bias == math.inf

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """No substitution in steps that begin inside, whatever the bias: for a request that asks for exactness."""
        self._exact_requests += 1
        try:
            yield
        finally:
            self._exact_requests -= 1

    def allowed(self, phase: Literal["decode", "prefill"]) -> bool:
        """Whether a step that begins now may have stand-ins."""
        return self._bias > 0 and (phase == "decode" or self.settings.prefill) and not self._exact_requests

    def begin_step(self, tokens: int, phase: Literal["decode", "prefill"], *, exact: int = 0) -> bool:
        """Start a step; whether its layers may be given stand-ins, but for `exact` of its tokens."""
        self._substituting = self.allowed(phase) and exact < tokens
        lossy = tokens - exact if self._substituting else 0
        self.tokens += lossy
        self.exact_tokens += tokens - lossy
        return self._substituting

    @property
    def substituting(self) -> bool:
        """Whether the step that is being computed may have stand-ins."""
        return self._substituting

    def choose(
        self,
        layer: int,
        routes: IntArray,
        resident: Bools,
        router: Callable[[], tuple[Floats, Floats]],
    ) -> IntArray:
        """Choose the experts that a layer computes with, and count what is replaced.

        Parameters
        ----------
        layer : int
            The layer.
        routes : ndarray of int64, shape (tokens, top_k)
            The router's choice, best first.
        resident : ndarray of bool, shape (experts,)
            Experts that cost no load.
        router : callable
            Gives the router's scores, shape ``(tokens, experts)``, and its gate weights of `routes`, shape ``(tokens,
            top_k)``, as :func:`expertier.virtual.selection.choose` takes them; called only when an expert is absent.

        Returns
        -------
        ndarray of int64, shape (tokens, top_k)
            `routes` itself when nothing is replaced.
        """
        if not self._substituting:
            return routes
        self.count(layer, routes)
        if resident[routes].all():
            return routes
        position = self._position[layer]
        scores, weights = router()
        chosen = choose_together(scores, resident, routes, weights, bias=self._bias, protect=self.settings.protect)
        if chosen is routes:
            return routes
        replaced = chosen != routes
        count = int(replaced.sum())
        if not count:
            return routes
        self.stood_in = True
        self.substituted[position] += count
        if len(weights) == 1:
            self.mass[position] += weights[replaced].sum() / max(weights.sum(), _TINY)
        else:
            shares = (weights * replaced).sum(axis=1) / np.maximum(weights.sum(axis=1), _TINY)
            self.mass[position] += float(shares.sum())
        return chosen

    def count(self, layer: int, routes: IntArray) -> None:
        """Count what a router chose; :meth:`choose` does it itself, and where nothing is absent nobody need choose."""
        self.wishes[self._position[layer]] += routes.size

    def end_step(self) -> None:
        """End a step."""
        if self.after_step is not None:
            self.after_step(self)

    def stats(self) -> VirtualStats:
        """Return a snapshot."""
        return VirtualStats(
            bias=self._bias,
            tokens=self.tokens,
            exact_tokens=self.exact_tokens,
            layers=self._layers,
            substituted_share=tuple((self.substituted / np.maximum(self.wishes, 1)).tolist()),
            substituted_mass=tuple((self.mass / max(self.tokens, 1)).tolist()),
        )

    def words(self) -> str:
        """What the mode line says of it."""
        if not self._bias:
            return "lossless (virtual experts at bias 0)"
        if self.hard:
            return "lossy: resident experts only"
        protected = f", first {self.settings.protect} protected" if self.settings.protect else ""
        prompts = ", prompts too" if self.settings.prefill else ""
        return f"lossy: resident experts preferred by {self._bias:g}{protected}{prompts}"
