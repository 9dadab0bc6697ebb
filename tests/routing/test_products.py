"""Products in blocks are those in one go."""

from __future__ import annotations

import numpy as np
import pytest

from expertier.routing.products import pairs, times


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (64, 64, 256), (300, 7, 6144), (5, 700, 3), (2, 3, 1 << 19)])
def test_every_row_is_multiplied_with_every_row(shape: tuple[int, int, int]) -> None:
    left, right, width = shape
    random = np.random.default_rng(0)
    first, second = (random.random((rows, width), dtype=np.float32) for rows in (left, right))
    found = pairs(first, second)
    assert found.shape == (left, right) and found.dtype == np.float32
    np.testing.assert_allclose(found, first.astype(np.float64) @ second.T.astype(np.float64), rtol=1e-4)
    if right:
        np.testing.assert_allclose(times(first, second[0]), found[:, 0], rtol=1e-3)
