"""A feature that loses turns itself off: loads ahead must come true, and steps with them must be quicker than without.

Two judges, because they see different things. :class:`Confidence` sees at once, layer by layer, whether what was loaded
ahead was used, and makes the prefetch wider or narrower. :class:`GainGate` sees what no count tells: whether steps
take longer, for whatever reason, and whether what they gain is worth the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

_TIE = 1.005  # so much slower is no loss: medians of a few steps differ by more
_FREE = 1.02  # so many times the bytes cost nothing, for the same reason
_PRICE = 0.25  # share of a step's time that has to be gained for twice the bytes
_LONGEST = 8  # times `hold` that a winner who keeps winning stays
_MOST_TRIALS = 4  # in a row, when the first does not say enough
_NORMAL = 1.4826 * 1.2533  # standard error of a median, from the median distance: of a normal distribution
_SURE = 1.0  # standard errors from which a difference decides: more would cost more steps of the worse kind
_MEMORY = 0.995  # weight of the past in a layer's record, by step
_BENEFIT = 2.0  # loads' worth of doubt a layer is given the benefit of
WIDEST: Final = 1.25
"""A predictor that is too modest is believed so much more, at most."""


class Confidence:
    """Holds the chances by which experts were loaded ahead against how often they were used, layer by layer.

    Only absent experts count, because only they are loaded: a predictor can be right in general and wrong about them.

    Parameters
    ----------
    layers, experts : int
        Layers with routed experts, and the most experts of one.

    Notes
    -----
    Records fade, so a layer that was turned off is tried again after some hundred steps, with a load or two.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._pending = np.zeros((layers, experts), np.float64)
        self._begun: set[int] = set()  # layers that have any
        self._claimed = np.zeros(layers)
        self._used = np.zeros(layers)

    def factor(self, first: int = 0) -> NDArray[np.float64]:
        """By what the chances of each layer from `first` on are to be multiplied, shape ``(layers - first, 1)``."""
        ratio = (self._used[first:] + _BENEFIT) / (self._claimed[first:] + _BENEFIT)
        return np.minimum(ratio, WIDEST)[:, None]

    def begun(self, layer: int, experts: NDArray[np.int64], chances: NDArray[np.float64]) -> None:
        """Note loads ahead for the layer at a position, by the chances the predictor gave."""
        self._pending[layer, experts] = chances
        self._begun.add(layer)

    def settle(self, layer: int, routes: NDArray[np.int64]) -> None:
        """The router of the layer at a position has chosen: hold it against what was loaded for it."""
        self._claimed[layer] *= _MEMORY
        self._used[layer] *= _MEMORY
        if layer in self._begun:
            self._begun.remove(layer)
            pending = self._pending[layer]
            self._claimed[layer] += pending.sum()
            self._used[layer] += np.count_nonzero(pending[np.unique(routes)])
            pending[:] = 0.0

    def learned(self) -> dict[str, list[float]]:
        """What a later run may begin with (:meth:`warm`)."""
        return {"claimed": np.round(self._claimed, 3).tolist(), "used": np.round(self._used, 3).tolist()}

    def warm(self, learned: Mapping[str, Any]) -> None:
        """Begin with what an earlier run found.

        Raises
        ------
        ValueError, KeyError, TypeError
            It is not of this model.
        """
        claimed, used = (np.array(learned[name], np.float64) for name in ("claimed", "used"))
        if not claimed.shape == used.shape == self._used.shape or not (np.isfinite(claimed) & np.isfinite(used)).all():
            raise ValueError("not one record for each layer")
        self._claimed, self._used = np.maximum(claimed, 0.0), np.maximum(used, 0.0)


class GainGate:
    """Decides by trial whether to prefetch.

    A trial alternates short blocks of steps with and without prefetching and compares their median step times. Bytes
    have a price: reading more must make steps quicker. Step times vary by a quarter, because text does, so a trial that
    could be chance goes on for up to four times as long. The winner stays for `hold` steps, then a new trial begins,
    because text and cache contents change; who wins again stays twice as long.

    Parameters
    ----------
    mode : {"auto", "on", "off"}
        ``auto`` measures; the others are constant.
    block : int
        Steps in one block.
    rounds : int
        Blocks of each kind in a trial.
    hold : int
        Steps between the first trials.
    """

    def __init__(
        self, mode: Literal["auto", "on", "off"] = "auto", *, block: int = 4, rounds: int = 8, hold: int = 512
    ) -> None:
        self.mode = mode
        self._block = block
        self._rounds = rounds
        self._hold = hold
        self._left = 0  # steps until the next trial
        self._trial: tuple[list[float], list[float]] = ([], [])  # step times without and with prefetching
        self._bytes = [0, 0]
        self._winner = True
        self._tried = False
        self._longer = 1

    @property
    def open(self) -> bool:
        """Whether to prefetch now."""
        if self.mode != "auto":
            return self.mode == "on"
        if self._left:
            return self._winner
        done = len(self._trial[0]) + len(self._trial[1])
        return done // self._block % 2 == 0

    def step(self, seconds: float, volume: int = 0) -> None:
        """Account for one step that took `seconds` and read `volume` bytes."""
        if self.mode != "auto":
            return
        if self._left:
            self._left -= 1
            return
        trying = self.open
        self._trial[trying].append(seconds)
        self._bytes[trying] += volume
        trials, rest = divmod(sum(map(len, self._trial)), 2 * self._rounds * self._block)
        if not rest:
            gain = self._gain()
            if abs(gain) < _SURE * self._error() and trials < _MOST_TRIALS:
                return
            won = gain >= 0.0
            self._longer = min(2 * self._longer, _LONGEST) if self._tried and won == self._winner else 1
            self._winner, self._tried = won, True
            self._left = self._hold * self._longer
            self._trial, self._bytes = ([], []), [0, 0]

    def _gain(self) -> float:
        """Share of a step that prefetching saves beyond what it has to."""
        without, within = map(median, self._trial)
        extra = max(0.0, self._bytes[True] / max(self._bytes[False], 1) - _FREE)
        return _TIE - _PRICE * extra - within / max(without, 1e-9)

    def _error(self) -> float:
        """Standard error of the gain, from how far step times are from their medians."""
        spread = 0.0
        for seconds in self._trial:
            middle = median(seconds)
            away = median([abs(value - middle) for value in seconds]) / max(middle, 1e-9)
            spread += (_NORMAL * away) ** 2 / len(seconds)
        return math.sqrt(spread)

    def learned(self) -> bool | None:
        """Who won the last trial: whether it was prefetching; ``None`` before the first."""
        return self._winner if self._tried else None

    def warm(self, winner: bool) -> None:
        """Begin with who won in an earlier run, as if that trial had just ended."""
        self._winner = winner
        self._left = self._hold
        self._tried = True
