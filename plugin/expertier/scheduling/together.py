"""How many requests should join at once: prompts that are computed in one step share what it loads."""

from __future__ import annotations

import math

_QUICKLY, _SLOWLY = 1 / 16, 1 / 64
_LEAST_STEPS = 16  # without prompts, after which anything is known of them
_LEAST_PROMPTS = 4  # steps with prompts
_LEAST_PART = 4  # at most one place in so many stays empty


class Together:
    """Says how many requests should join at once, from what steps load.

    A prompt uses nearly every expert, so a step with a prompt in it loads about as much as one with two. Whoever waits
    with an empty place until a second one is free saves such a step, and loses a token in every step until then.

    Let a step with prompts load `e` experts more than one without, let a request leave every `t` steps, and let `c` be
    what a running request's token costs on average beyond what it adds to a step. Then `k` at once cost
    ``e / k + c * t * (k - 1) / 2`` per request, which is least at ``sqrt(2 * e / (c * t))``. How loads grow with the
    requests that run is taken to be a curve of saturation, ``1 - exp(-requests / scale)``, through what steps without
    prompts load, and under what steps with prompts do. With everything resident, with batches that use every expert
    anyway and with prompts that fill steps of their own nothing is gained by waiting, and the answer is one.
    """

    def __init__(self) -> None:
        self._steps = self._prompts = self._joined = 0
        self._running = self._loads = self._ceiling = 0.0  # averages: requests and loads of a step, with prompts
        self._gap = 0.0  # steps from one departure to the next
        self._since = 0

    def step(self, tokens: int, loads: int) -> None:
        """Account for a step of so many requests, 0 for one with prompts, and the experts it loaded."""
        self._since += 1
        if tokens:
            self._steps += 1
            self._running = _mean(self._running, tokens, self._steps, _SLOWLY)
            self._loads = _mean(self._loads, loads, self._steps, _SLOWLY)
        elif loads:
            self._prompts += 1
            self._ceiling = _mean(self._ceiling, loads, self._prompts, _QUICKLY)

    def joined(self) -> None:
        """Note that a request runs now."""
        self._joined += 1

    def left(self) -> None:
        """Note that a request which ran is over."""
        self._gap += _QUICKLY * (self._since - self._gap) if self._gap else self._since
        self._since = 0

    def size(self, places: int) -> int:
        """Say how many should join at once where so many may run."""
        most = places // _LEAST_PART
        known = self._steps >= _LEAST_STEPS and self._prompts >= _LEAST_PROMPTS and self._gap > 0
        if most < 2 or not known or self._prompts > 1.5 * self._joined:
            return 1
        excess, filled = self._ceiling - self._loads, self._loads / max(self._ceiling, 1e-9)
        if excess <= 0 or filled <= 0:
            return 1
        added = excess * -math.log1p(-filled) / self._running  # by one more request: the slope of the curve
        empty = max(self._loads / self._running - added, 1e-9)
        return max(1, min(most, round(math.sqrt(2 * excess / (empty * self._gap)))))


def _mean(mean: float, value: float, count: int, rate: float) -> float:
    """The mean of the first values, and a decaying one from then on."""
    return mean + max(rate, 1 / count) * (value - mean)
