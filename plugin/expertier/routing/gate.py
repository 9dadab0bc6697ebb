"""A feature that loses turns itself off: loads ahead must come true, and steps with them must be quicker than without.

Two judges, because they see different things. :class:`Confidence` sees at once, layer by layer, whether what was loaded
ahead was used, and makes the prefetch wider or narrower. :class:`GainGate` sees what no count tells: whether steps
take longer, for whatever reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_TIE = 1.005  # so much slower is no loss: medians of a few steps differ by more
_MEMORY = 0.995  # weight of the past in a layer's record, by step
_BENEFIT = 2.0  # loads' worth of doubt a layer is given the benefit of
_WIDEST = 1.25  # a predictor that is too modest is believed so much more


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
        self._claimed = np.zeros(layers)
        self._used = np.zeros(layers)

    def factor(self, first: int = 0) -> NDArray[np.float64]:
        """By what the chances of each layer from `first` on are to be multiplied, shape ``(layers - first, 1)``."""
        ratio = (self._used[first:] + _BENEFIT) / (self._claimed[first:] + _BENEFIT)
        return np.minimum(ratio, _WIDEST)[:, None]

    def begun(self, layer: int, experts: NDArray[np.int64], chances: NDArray[np.float64]) -> None:
        """Note loads ahead for the layer at a position, by the chances the predictor gave."""
        self._pending[layer, experts] = chances

    def settle(self, layer: int, routes: NDArray[np.int64]) -> None:
        """The router of the layer at a position has chosen: hold it against what was loaded for it."""
        pending = self._pending[layer]
        claimed = float(pending.sum())
        self._claimed[layer] = _MEMORY * self._claimed[layer] + claimed
        self._used[layer] *= _MEMORY
        if claimed:
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

    A trial alternates short blocks of steps with and without prefetching and compares their median step times; the
    winner stays for `hold` steps, then a new trial begins, because text and cache contents change.

    Parameters
    ----------
    mode : {"auto", "on", "off"}
        ``auto`` measures; the others are constant.
    block : int
        Steps in one block.
    rounds : int
        Blocks of each kind in a trial.
    hold : int
        Steps between trials.
    """

    def __init__(
        self, mode: Literal["auto", "on", "off"] = "auto", *, block: int = 8, rounds: int = 4, hold: int = 512
    ) -> None:
        self.mode = mode
        self._block = block
        self._rounds = rounds
        self._hold = hold
        self._left = 0  # steps until the next trial
        self._trial: tuple[list[float], list[float]] = ([], [])  # step times without and with prefetching
        self._winner = True
        self._tried = False

    @property
    def open(self) -> bool:
        """Whether to prefetch now."""
        if self.mode != "auto":
            return self.mode == "on"
        if self._left:
            return self._winner
        done = len(self._trial[0]) + len(self._trial[1])
        return done // self._block % 2 == 0

    def step(self, seconds: float) -> None:
        """Account for one step that took `seconds`."""
        if self.mode != "auto":
            return
        if self._left:
            self._left -= 1
            return
        self._trial[self.open].append(seconds)
        without, within = self._trial
        if len(without) + len(within) == 2 * self._rounds * self._block:
            self._winner = median(within) <= _TIE * median(without)
            self._left = self._hold
            self._trial = ([], [])
            self._tried = True

    def learned(self) -> bool | None:
        """Who won the last trial: whether it was prefetching; ``None`` before the first."""
        return self._winner if self._tried else None

    def warm(self, winner: bool) -> None:
        """Begin with who won in an earlier run, as if that trial had just ended."""
        self._winner = winner
        self._left = self._hold
        self._tried = True
