"""How often every expert was used in the long run; what a profile keeps."""

from __future__ import annotations

import numpy as np

from expertier.residency.base import FloatArray, IntArray

_MOST_TOKENS = 1e6  # older uses count less from here on, so that a profile follows what the model is used for


class UseCounts:
    """Counts uses by expert over all tokens.

    Parameters
    ----------
    experts : int
        Experts of the model.
    """

    def __init__(self, experts: int) -> None:
        self._count = np.zeros(experts)
        self.tokens = 0.0

    def note(self, experts: IntArray, tokens: int) -> None:
        """Note what the router of one layer chose for so many tokens."""
        if tokens == 1:
            self._count[experts] += 1.0
        else:
            self._count += np.bincount(experts, minlength=len(self._count))

    def advance(self, tokens: int) -> None:
        """So many tokens begin."""
        self.tokens += tokens
        if self.tokens > _MOST_TOKENS:
            self.scale(0.5)

    def scale(self, factor: float) -> None:
        """Let everything so far count less."""
        self._count *= factor
        self.tokens *= factor

    def add(self, chances: FloatArray, tokens: float) -> None:
        """Take in what an earlier run counted."""
        self._count += chances * tokens
        self.tokens += tokens

    def chances(self) -> FloatArray:
        """Share of tokens that used each expert, shape ``(experts,)``; zeros before the first token."""
        result: FloatArray = np.minimum(self._count / max(self.tokens, 1.0), 1.0)
        return result
