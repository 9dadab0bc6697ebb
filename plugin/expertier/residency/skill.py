"""Whether a forecast says more than the past does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import FloatArray

_MEMORY = 0.95  # weight of the past by step: some twenty steps decide


class Skill:
    """Brier score of forecast chances against that of the chances past uses give, over the last steps.

    A chance p of something that happens (1) or not (0) costs ``(p - outcome)**2``. The score is proper: it is least
    in the mean for the true chances, and a forecast cannot win by being bold or cautious.
    """

    def __init__(self) -> None:
        self._gain = 0.0

    @property
    def positive(self) -> bool:
        """Whether the forecast was not worse; true until something is known."""
        return self._gain >= 0.0

    def judge(self, forecast: FloatArray, past: FloatArray, used: NDArray[np.bool_]) -> None:
        """Hold one step's forecast against what it used.

        Parameters
        ----------
        forecast, past : ndarray of float, shape (n,)
            Chances of experts as forecast, and by their past uses.
        used : ndarray of bool, shape (n,)
            Which of them the step used.
        """
        # (past - used)**2 - (forecast - used)**2 = (past - forecast) * (past + forecast - 2 * used)
        self._gain = _MEMORY * self._gain + float((past - forecast) @ (past + forecast - 2.0 * used))
