"""What is known of a forward pass before it computes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepKind:
    """What kind of forward pass runs.

    Attributes
    ----------
    real : bool
        Whether it serves requests; warm-ups and profiling runs do not.
    decode : bool
        Whether every request contributes one token.
    tokens : int or None
        So many tokens are the requests'; what follows is padding, which graphs of fixed sizes need. ``None``: all are.
    asked, prompt : ndarray of bool, shape (tokens,), or None
        Tokens of requests that asked for exactness, and tokens of prompts; ``None`` where nobody needs to know.
    """

    real: bool
    decode: bool
    tokens: int | None = None
    asked: NDArray[np.bool_] | None = None
    prompt: NDArray[np.bool_] | None = None

    def exact(self, tokens: int, *, prompts: bool) -> NDArray[np.bool_] | None:
        """Which of so many tokens may not be given stand-ins, those of `prompts` among them; ``None``: all may."""
        if self.asked is None or self.prompt is None:
            return None
        exact = self.asked | self.prompt if prompts else self.asked
        if not exact.any():
            return None
        return np.pad(exact, (0, max(0, tokens - len(exact))), constant_values=True)  # what is beyond is padding
