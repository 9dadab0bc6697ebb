"""A model small enough to know everything about it: logits are a table, stand-ins disturb them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from expertier.comparison.prompts import Text
from expertier.telemetry import Stats

VOCABULARY = 32
LAYERS = 4
EXPERTS = 16


class TableSession:
    """The next token depends on the last one alone. A stand-in mixes the table with noise, the more the larger bias.

    Parameters
    ----------
    harm : float
        Noise per substituted gate mass.
    """

    def __init__(self, *, harm: float = 1.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, 2, (VOCABULARY, VOCABULARY)).astype(np.float32)
        self._noise = rng.normal(0, 1, (VOCABULARY, VOCABULARY)).astype(np.float32)
        self.harm = harm
        self.bias = 0.0
        self.protect = 0
        self.budget = 50
        self._row = self.table[0]
        self._substituted = np.zeros(LAYERS)
        self._stats = Stats(budget_bytes=50, total_bytes=100)

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) % VOCABULARY for letter in text]

    def follow(self, tokens: Sequence[int], *, prompt: int) -> Iterator[None]:
        self._read(tokens[prompt - 1])
        yield
        for token in tokens[prompt:]:
            self._read(token)
            yield

    def _read(self, last: int) -> None:
        mass = self._mass()
        self._row = (self.table[last] + np.float32(self.harm * mass) * self._noise[last]).astype(np.float32)
        self._substituted += mass
        self._stats.decode.tokens += 1
        self._stats.decode.misses += round(8 * (1 - self.budget / 100) * (1 - mass))
        self._stats.bytes_read += 10 * round(8 * (1 - self.budget / 100) * (1 - mass))

    def logits(self) -> NDArray[np.float32]:
        return self._row

    def substituted(self) -> NDArray[np.float64]:
        return self._substituted

    def stats(self) -> Stats:
        import copy

        return copy.deepcopy(self._stats)

    def resize(self, budget: int) -> None:
        self.budget = budget
        self._stats.budget_bytes = budget

    def set_virtual(self, bias: float, protect: int) -> None:
        self.bias, self.protect = bias, protect

    def _mass(self) -> float:
        """Saturates with the bias; protecting keeps most of it; more memory leaves less to stand in for."""
        reach = 1.0 if np.isinf(self.bias) else 1 - np.exp(-4 * self.bias)
        return float(reach * 0.5 ** min(self.protect, 8) * (1 - self.budget / 100) * 0.5)

    def write(self, count: int, seed: int) -> str:
        """Text as the exact model would say it."""
        rng = np.random.default_rng(seed)
        token, letters = 0, []
        for _ in range(count):
            weights = np.exp(self.table[token] - self.table[token].max())
            token = int(rng.choice(VOCABULARY, p=weights / weights.sum()))
            letters.append(chr(64 + token))
        return "".join(letters)

    def texts(self, count: int = 12, tokens: int = 80) -> list[Text]:
        return [Text(domain=f"d{index % 3}", text=self.write(tokens, index)) for index in range(count)]
