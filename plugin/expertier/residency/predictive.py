"""Evicts what is used furthest in the future, as far as a forecast and the past can tell: ExpertFlow's PLEC."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import ExpertSpace, FloatArray, IntArray
from expertier.residency.lfu import DEFAULT_HALF_LIFE, LFU
from expertier.residency.skill import Skill

_PATIENCE = 8.0  # tokens to the next use after which keeping an expert is worth 1/e

# Fitted on text that neither predictor nor benchmark saw, for batches of 1, 4 and 8 together: log-odds of
# exp(-wait / _PATIENCE), wait being the tokens to an expert's next use, from log-odds of what is known.
_PAST_ALONE = np.array([1.2, 0.66])  # constant, chance by past uses
_WITH_FORECAST = np.array([0.32, 0.23, 0.2, 0.015, 0.18])  # constant, by past uses, within the next 1, 4, 16 tokens
_LEAST, _MOST = 2e-3, 0.998  # chances beyond these are not believed


class Predictive:
    """Evicts the expert with the least expected ``exp(-wait)``, the wait being that until its next use.

    Parameters
    ----------
    space : ExpertSpace
        The model's experts.
    half_life : float
        Tokens after which a past use counts half.

    Notes
    -----
    An expert of a layer that this step has yet to reach is used in this very step with the forecast chance, else some
    tokens later; one of a layer that has passed, some tokens later, so what was predicted there and not used goes
    next. How much later is estimated from past uses and from the forecast's chances for the next tokens. Within a
    token, layers run in order, and the sooner a layer's turn the more its experts count; without any forecast this
    alone is a tenth better than an LFU is than LRU.

    A forecast is left out as long as past uses say more about what routers choose (:class:`Skill`).
    """

    name = "predictive"

    def __init__(self, space: ExpertSpace, half_life: float = DEFAULT_HALF_LIFE) -> None:
        self._past = LFU(space, half_life)
        self._layer_of = space.layer_of
        self._bounds = [*np.searchsorted(space.layer_of, np.arange(space.layers)).tolist(), len(space)]
        self._turn = np.exp(-space.layer_of / (space.layers * _PATIENCE))
        self._passed = np.ones(space.layers, bool)  # layers that the running step has reached
        self._stale = np.ones(space.layers, bool)  # layers whose scores are to be computed again
        self._scores = np.zeros(len(space))
        self._used = np.zeros(len(space), bool)  # by the running step
        self._fresh = False  # the forecast is about the step that comes next
        self._now: FloatArray | None = None
        self._next: FloatArray | None = None  # chance that the token after this step uses it
        self._before: FloatArray | None = None  # what was said of the running step one step ago
        self._known = np.zeros(len(space))  # the same by past uses, at the time of the forecast
        self._later = np.zeros(len(space))  # what the forecast adds to the log-odds
        self._skill_now, self._skill_next = Skill(), Skill()

    def expect(self, now: FloatArray, soon: FloatArray) -> bool:
        """Take in a forecast, before the step it is about or at its beginning.

        Parameters
        ----------
        now : ndarray of float, shape (N,)
            Chance that the step uses each expert.
        soon : ndarray of float, shape (horizons, N)
            Chance of a use within the next 1, 4 and 16 tokens after it.

        Returns
        -------
        bool
            Whether it is listened to, now or for what comes later.
        """
        self._judge()
        if not np.isfinite(now.sum() + soon.sum()):
            self._now = self._next = None
            return False
        self._now, self._next = now, soon[0]
        self._known = self._by_past(slice(None))
        self._later = _WITH_FORECAST[2:] @ _log_odds(soon) + _WITH_FORECAST[0]
        self._fresh = True
        self._passed[:] = False
        self._stale[:] = True
        return self._skill_now.positive or self._skill_next.positive

    def touch(self, experts: IntArray, ages: FloatArray | None = None) -> None:
        self._past.touch(experts, ages)
        self._used[experts] = True
        layers = self._layer_of[experts]
        self._passed[layers] = True
        self._stale[layers] = True
        self._fresh = False

    def advance(self, tokens: int) -> None:
        if not self._fresh:
            self._judge()
            self._now = self._next = None
        self._fresh = False
        self._past.advance(tokens)
        self._passed[:] = False
        self._stale[:] = True

    def keep_scores(self, experts: IntArray, layer: int) -> FloatArray:
        # The time from `layer` on is the same for all: only differences between layers matter.
        if self._stale.any():
            self._refresh()
        return self._scores[experts]

    def use_probability(self, experts: IntArray) -> FloatArray:
        coming = ~self._passed[self._layer_of[experts]]
        past = self._by_past(experts)
        now = past if self._now is None or not self._skill_now.positive else self._now[experts]
        following = past if self._next is None or not self._skill_next.positive else self._next[experts]
        result: FloatArray = np.where(coming, now, following)
        return result

    def warm(self, chances: FloatArray) -> None:
        self._past.warm(chances)
        self._stale[:] = True

    def _by_past(self, experts: IntArray | slice) -> FloatArray:
        """Chance that a step uses each expert, as past uses have it."""
        result: FloatArray = 1.0 - np.exp(-self._past.rate(experts))
        return result

    def _refresh(self) -> None:
        if self._stale.all():
            self._score(slice(None), ~self._passed[self._layer_of])
        else:
            for layer in np.flatnonzero(self._stale).tolist():
                self._score(slice(*self._bounds[layer : layer + 2]), not self._passed[layer])
        self._stale[:] = False

    def _score(self, experts: slice, coming: NDArray[np.bool_] | bool) -> None:
        past = self._by_past(experts)
        if self._next is not None and self._skill_next.positive:
            odds = self._later[experts] + _WITH_FORECAST[1] * _log_odds(past)
        else:
            odds = _PAST_ALONE[0] + _PAST_ALONE[1] * _log_odds(past)
        later = 1.0 / (1.0 + np.exp(-odds))
        if coming is not False:
            now = past if self._now is None or not self._skill_now.positive else self._now[experts]
            later += coming * now * (1.0 - later)
        np.multiply(self._turn[experts], later, out=self._scores[experts])

    def _judge(self) -> None:
        """The running step ends: hold what was forecast about it, now and one step ago, against what it used."""
        reached = np.flatnonzero(self._passed[self._layer_of])
        used = self._used[reached]
        self._used[:] = False
        if not used.any():
            return
        if self._before is not None:
            self._skill_next.judge(self._before[reached], self._known[reached], used)
        if self._now is not None:
            self._skill_now.judge(self._now[reached], self._known[reached], used)
        self._before = self._next


def _log_odds(chances: FloatArray) -> FloatArray:
    inside = np.minimum(np.maximum(chances, _LEAST), _MOST)  # np.clip takes twice as long on a layer
    result: FloatArray = np.log(inside / (1.0 - inside))
    return result
