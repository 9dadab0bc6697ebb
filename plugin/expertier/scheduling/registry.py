"""Batchers by name."""

from __future__ import annotations

from collections.abc import Callable

from expertier.errors import UnsupportedOptionError
from expertier.scheduling.base import Batcher
from expertier.scheduling.fcfs import FirstCome
from expertier.scheduling.strategies import Balanced, Greedy, Random, Similarity

CONTROL = FirstCome.name
"""What the others are compared with."""

BATCHERS: dict[str, Callable[[], Batcher]] = {
    CONTROL: FirstCome,
    "similarity": Similarity,
    "greedy": Greedy,
    "balanced": Balanced,
    "random": Random,
}


def make_batcher(name: str) -> Batcher:
    """Build the batcher called `name`.

    Raises
    ------
    UnsupportedOptionError
        There is none.
    """
    if name not in BATCHERS:
        raise UnsupportedOptionError(f"There is no scheduler {name!r}.", f"Choose from: {', '.join(BATCHERS)}.")
    return BATCHERS[name]()
