"""Keeps a quality budget while serving: watches a proxy of the divergence and steers the bias.

The overdraft is what was spent above the allowance, token by token, and never less than nothing (Page 1954, CUSUM). In
text like that of the calibration it stays near zero. Where stand-ins cost more than they did there it grows, and at so
many tokens' allowance the bias backs off: the sooner, the larger the excess. Up it goes slowly, and never beyond what
the profile covers.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.quality.proxy import Proxy

logger = logging.getLogger("expertier")

_BLOCK = 16  # tokens over which gate mass is averaged: single tokens are noise
_OVERDRAFT = 32  # tokens' allowance that may be overspent: an excess of an eighth is seen within 256 tokens
_DOWN, _UP = (0.25, 0.75), 1.1  # bounds of a step down, a step up
_PATIENCE = 8  # blocks below the allowance before a step up
_ROOM = 0.7  # share of the allowance below which there is room
_LEAST = 0.005  # a bias below is none
_RETRY = 512  # tokens after which an exact model is tried with stand-ins again
_MEMORY = 0.9  # of the shown figures, per block


class Steered(Protocol):
    """What the controller needs of :class:`expertier.virtual.VirtualExperts`.

    Attributes
    ----------
    bias : float
        May be set between steps.
    tokens, exact_tokens : int
        Tokens computed while substitution was allowed, and the others.
    mass : ndarray of float64, shape (layers,)
        Sum over the former of the gate mass that stand-ins took.
    """

    bias: float
    tokens: int
    exact_tokens: int
    mass: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class QualityStats:
    """Where the budget stands.

    Attributes
    ----------
    allowed, estimated, spent : float
        Relative increase of the perplexity: what is allowed, what the proxy says it costs now (the last hundred or so
        tokens), and what it says it has cost since the start.
    allowed_kl, estimated_kl, spent_kl : float
        The same as KL divergence per token.
    bias, calibrated_bias : float
        In force, and the largest one that the profile covers.
    back_offs : int
        How often the bias went down.
    tokens : int
        Tokens watched.
    """

    allowed: float
    estimated: float
    spent: float
    allowed_kl: float
    estimated_kl: float
    spent_kl: float
    bias: float
    calibrated_bias: float
    back_offs: int
    tokens: int


class QualityController:
    """Steers a bias; call it after every step.

    Parameters
    ----------
    proxy : Proxy
        From gate mass to divergence.
    increase : float
        Relative increase of the perplexity that is allowed: as much divergence as is expected to cost that.
    bias : float
        What the profile covers at this memory budget.

    Notes
    -----
    A step costs two additions and a comparison but for every 16th token. Backing off is told once, until the bias has
    been back at its calibrated value.
    """

    def __init__(self, proxy: Proxy, *, increase: float, bias: float) -> None:
        self._proxy = proxy
        self._increase = increase
        self._allowed = proxy.allowed_kl(increase)
        self._calibrated = bias
        self._lock = threading.Lock()
        self._seen = self._exact_since = 0
        self._mass: NDArray[np.float64] | None = None
        self._overdraft = 0.0
        self._over_tokens = 0  # since the overdraft began
        self._calm = 0
        self._estimate = 0.0
        self._spent = 0.0
        self._tokens = 0
        self._back_offs = 0
        self._told = False
        self._bias = bias
        self._kept = 1.0  # of the calibrated bias

    def __call__(self, virtual: Steered) -> None:
        """Look at the counters after a step, and steer."""
        if virtual.tokens - self._seen < _BLOCK:
            if not self._bias and self._calibrated and virtual.exact_tokens - self._exact_since > _RETRY:
                with self._lock:
                    virtual.bias = self._bias = min(_LEAST, self._calibrated)
            return
        with self._lock:
            tokens = virtual.tokens - self._seen
            before = self._mass if self._mass is not None else 0.0
            self._seen, self._mass = virtual.tokens, virtual.mass.copy()
            self._account((self._mass - before) / tokens, tokens)
            self._exact_since = virtual.exact_tokens
            virtual.bias = self._bias

    def covers(self, virtual: Steered, bias: float) -> None:
        """Take another calibrated bias, because the memory budget has changed."""
        with self._lock:
            if self._calibrated:  # a budget in between that nothing is known of forgets no backing off
                self._kept = self._bias / self._calibrated
            self._calibrated = bias
            self._bias = bias * self._kept
            virtual.bias = self._bias

    def stats(self, virtual: Steered) -> QualityStats:
        """Return a snapshot."""
        with self._lock:
            spent = self._spent / self._tokens if self._tokens else 0.0
            return QualityStats(
                allowed=self._increase,
                estimated=self._proxy.increase(self._estimate),
                spent=self._proxy.increase(spent),
                allowed_kl=self._allowed,
                estimated_kl=self._estimate,
                spent_kl=spent,
                bias=virtual.bias,
                calibrated_bias=self._calibrated,
                back_offs=self._back_offs,
                tokens=self._tokens,
            )

    def _account(self, mass: NDArray[np.float64], tokens: int) -> None:
        kl = self._proxy.kl(mass)
        self._estimate = kl if not self._tokens else _MEMORY * self._estimate + (1 - _MEMORY) * kl
        self._tokens += tokens
        self._spent += kl * tokens
        self._overdraft = max(0.0, self._overdraft + (kl - self._allowed) * tokens)
        self._over_tokens = self._over_tokens + tokens if self._overdraft else 0
        if self._overdraft > _OVERDRAFT * self._allowed:
            self._back_off()
        elif kl < _ROOM * self._allowed and self._bias < self._calibrated:
            self._calm += 1
            if self._calm >= _PATIENCE:
                self._calm = 0
                self._bias = min(self._calibrated, max(self._bias, _LEAST) * _UP)
                self._told = self._told and self._bias < self._calibrated
        elif kl >= _ROOM * self._allowed:
            self._calm = 0

    def _back_off(self) -> None:
        excess = self._overdraft / self._over_tokens / self._allowed  # above the allowance, in allowances
        factor = min(max(1 / (1 + excess), _DOWN[0]), _DOWN[1])
        self._bias = self._bias * factor if self._bias * factor >= _LEAST else 0.0
        self._overdraft, self._over_tokens, self._calm = 0.0, 0, 0
        self._back_offs += 1
        if not self._told:
            self._told = True
            logger.warning(
                "Quality budget: stand-ins cost about %.1f %% perplexity on this text, %.1f %% are allowed; the bias "
                "backs off from %.3g.",
                100 * self._proxy.increase(self._allowed * (1 + excess)),
                100 * self._increase,
                self._calibrated,
            )
