"""What is worked out once for each request that waits: the row of its path, and its products with others' rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from expertier.residency.base import IntArray
from expertier.routing.products import pairs

_GROWTH = 1.25
_NEGLIGIBLE = 1e-4
"""Part of the usual path's square up to which a difference from it may be nothing but rounding."""

Rows = NDArray[np.float32]
Side = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Of paths: products with the usual one, and one over the length of what sets them apart from it (0 for none)."""


class KeptRows:
    """Paths of those that wait, row by row in a matrix, from one decision to the next.

    A path that is the same object as in the decision before is neither copied nor multiplied again. Most of those that
    wait have waited before, and products of 256 paths of 48 x 128 experts take longer than all the rest of a decision.

    Parameters
    ----------
    make : callable
        From paths, shape ``(paths, width)``, to what is kept of them.

    Attributes
    ----------
    rows : ndarray of float32, shape (places, width)
        What is kept; places that nobody has any more are overwritten by and by.
    """

    def __init__(self, make: Callable[[Rows], Rows]) -> None:
        self._make = make
        self._paths: list[Rows | None] = []  # holding them keeps their ids from being given to others
        self._place: dict[int, int] = {}
        self.rows: Rows = np.zeros((0, 0), np.float32)
        self._products: NDArray[np.float32] = np.zeros((0, 0), np.float32)  # nan where not known

    def find(self, paths: Sequence[Rows]) -> IntArray:
        """Say where the rows of these paths are; new ones are made."""
        places = np.array([self._place.get(id(path), -1) for path in paths], np.int64)
        new = {id(paths[index]): paths[index] for index in np.flatnonzero(places < 0).tolist()}
        if new:
            free = np.setdiff1d(np.arange(len(self._paths)), places)
            if len(free) < len(new):
                self._grow(len(self._paths) + len(new) - len(free), paths[0].shape[0])
                free = np.setdiff1d(np.arange(len(self._paths)), places)
            self._fill(free[: len(new)], list(new.values()))
            places = np.array([self._place[id(path)] for path in paths], np.int64)
        return places

    def _grow(self, least: int, width: int) -> None:
        before, size = len(self._paths), max(least, int(_GROWTH * len(self._paths)))
        rows = np.zeros((size, width), np.float32)
        rows[:before] = self.rows.reshape(before, width)
        products = np.full((size, size), np.nan, np.float32)
        products[:before, :before] = self._products
        self.rows, self._products = rows, products
        self._paths += [None] * (size - before)

    def _fill(self, places: IntArray, paths: list[Rows]) -> None:
        self.rows[places] = self._make(np.stack(paths))
        self._products[places] = np.nan
        self._products[:, places] = np.nan
        for place, path in zip(places.tolist(), paths, strict=True):
            self._place.pop(id(self._paths[place]), None)
            self._paths[place], self._place[id(path)] = path, place

    def times(self, places: IntArray, others: Rows) -> NDArray[np.float32]:
        """Multiply rows with others, shape ``(others, width)``; float32 ``(places, others)``."""
        end = int(places.max(initial=-1)) + 1
        if 2 * len(places) < end:
            return pairs(self.rows[places], others)
        return pairs(self.rows[:end], others)[places]  # some more, and nothing is copied

    def products(self, places: IntArray, others: IntArray) -> NDArray[np.float32]:
        """Multiply rows with rows, each pair once while both are kept; float32 ``(places, others)``, a copy."""
        pick = np.ix_(places, others)
        unknown = np.isnan(self._products[pick])
        if unknown.any():
            # Nearly everybody lacks a product with who is new among the others, who is new among the places lacks all.
            self._multiply(places, others[unknown.mean(axis=0) > 0.5])
            self._multiply(others, places[np.isnan(self._products[pick]).any(axis=1)])
        found: NDArray[np.float32] = self._products[pick]
        return found

    def _multiply(self, places: IntArray, others: IntArray) -> None:
        product = self.times(places, self.rows[others])
        self._products[np.ix_(places, others)] = product
        self._products[np.ix_(others, places)] = product.T

    def squares(self, places: IntArray) -> NDArray[np.float32]:
        """Every row's product with itself, shape ``(places,)``."""
        unknown = places[np.isnan(self._products[places, places])]
        rows = self.rows[unknown]
        self._products[unknown, unknown] = np.einsum("ij,ij->i", rows, rows)
        found: NDArray[np.float32] = self._products[places, places]
        return found


class Cosines:
    """Turns products of paths into cosines of what sets them apart from the usual one.

    ``(a - u) @ (b - u)`` is ``a @ b - a @ u - b @ u + u @ u``: the usual path `u` changes with every step, ``a @ b``
    does not while both wait.

    Parameters
    ----------
    usual : ndarray of float32, shape (width,)
        `u`, made like the rows.
    """

    def __init__(self, usual: NDArray[np.float32]) -> None:
        self._square = float(np.einsum("i,i->", usual, usual))

    def side(self, squares: NDArray[np.float32], usual: NDArray[np.float32]) -> Side:
        """Describe paths by ``a @ a`` and ``a @ u``, each of shape ``(paths,)``."""
        left = squares - 2 * usual + self._square
        apart = left > _NEGLIGIBLE * self._square
        return usual, np.where(apart, 1 / np.sqrt(np.where(apart, left, 1)), 0).astype(np.float32)

    def of(self, products: NDArray[np.float32], left: Side, right: Side) -> NDArray[np.float32]:
        """Turn products, shape ``(left, right)``, into cosines; 0 where a path is the usual one."""
        apart = products - (left[0] - self._square)[:, None]
        apart -= right[0]
        apart *= left[1][:, None]
        apart *= right[1]
        return apart
