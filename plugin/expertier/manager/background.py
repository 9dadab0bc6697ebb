"""Loads for nobody in particular: free room is filled, and better experts take the place of worse ones."""

from __future__ import annotations

import logging

import numpy as np

from expertier.errors import ExpertLoadError
from expertier.manager.eviction import Eviction
from expertier.manager.loads import Loads
from expertier.manager.table import ABSENT, LOADING, ExpertTable
from expertier.residency.base import FloatArray, IntArray
from expertier.storage import BACKGROUND, PREFETCH, ReadRequest

logger = logging.getLogger("expertier")


class Background:
    """Begins loads in the background, a few at a time; everything runs with the manager's lock held.

    Parameters
    ----------
    table, eviction, loads
        The manager's.
    """

    def __init__(self, table: ExpertTable, eviction: Eviction, loads: Loads) -> None:
        self._table = table
        self._eviction = eviction
        self._loads = loads

    @property
    def busy(self) -> bool:
        """Whether such a load is under way."""
        return bool(self._table.filling.any())

    def fill(self, worth: FloatArray, most: int) -> int:
        """Begin loads of the best absent experts into free room."""
        return self._begin(self._best_absent(worth, most), worth, None, PREFETCH)

    def swap(self, worth: FloatArray, most: int, margin: float) -> int:
        """Begin loads of the best absent experts, each in place of one that is worth `margin` times less."""
        return self._begin(self._best_absent(worth, most), worth, margin, BACKGROUND)

    def _best_absent(self, worth: FloatArray, most: int) -> IntArray:
        absent = np.flatnonzero(self._table.state == ABSENT)
        return absent[np.argsort(-worth[absent], kind="stable")[:most]]

    def _begin(self, experts: IntArray, worth: FloatArray, margin: float | None, priority: int) -> int:
        table = self._table
        reads: list[list[ReadRequest]] = []
        try:
            for expert in experts.tolist():
                layer, _ = table.owner(expert)
                recycled: int | None = None
                if not table.fits(layer):
                    if margin is None:
                        continue
                    victims = self._eviction.victims_worth(layer, worth)
                    recycled, fits = self._eviction.make_room(layer, victims, float(worth[expert]) / margin)
                    if not fits:
                        break
                reads.append(self._loads.begin(layer, expert, recycled, priority))
                table.filling[expert] = table.state[expert] == LOADING
        except ExpertLoadError as error:  # whoever really needs the expert will raise it
            logger.warning("Loading in the background ended early: %s", error)
        finally:
            self._loads.submit(reads)
        return len(reads)
