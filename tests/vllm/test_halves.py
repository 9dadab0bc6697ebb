"""Computing what is there while the rest still loads: every expert of every token counts once, after it has arrived."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")


class Layer:
    """Experts that scale their input by a number of their own, and may not be asked for before they have arrived."""

    def __init__(self, arrived: Any) -> None:
        self.arrived = arrived
        self.calls = 0

    def compute(self, x: Any, weights: Any, ids: Any) -> Any:
        assert self.arrived[ids.numpy()].all(), "an expert that has not arrived"
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        assert ids.is_contiguous() and weights.is_contiguous() and x.is_contiguous()
        self.calls += 1
        return (x[:, None, :] * (weights * (ids + 1))[:, :, None]).sum(dim=1)

    def wait(self) -> None:
        self.arrived[:] = True


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4), st.floats(0, 1), st.booleans())
def test_the_halves_add_up_and_exact_tokens_are_computed_in_one_go(
    seed: int, tokens: int, top_k: int, here: float, some_exact: bool
) -> None:
    from expertier_vllm.halves import compute_in_halves

    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(8)[:top_k] for _ in range(tokens)], np.int32)
    weights, x = torch.from_numpy(rng.random((tokens, top_k), np.float32)), torch.from_numpy(rng.random((tokens, 3)))
    layer = Layer(rng.random(8) < here)
    exact = rng.random(tokens) < 0.5 if some_exact else None
    late, chosen = ~layer.arrived[ids], torch.from_numpy(ids)
    found = compute_in_halves(layer.compute, x, weights, chosen, late, exact, layer.wait)
    whole = Layer(np.ones(8, bool)).compute(x, weights, chosen)
    torch.testing.assert_close(found, whole)
    if exact is not None:
        assert torch.equal(found[exact], whole[exact])


def test_what_has_arrived_is_computed_before_anybody_waits() -> None:
    from expertier_vllm.halves import compute_in_halves

    layer = Layer(np.array([True, False]))
    order: list[str] = []

    def compute(x: Any, weights: Any, ids: Any) -> Any:
        order.append(f"computed {x.shape[0]}")
        return layer.compute(x, weights, ids)

    def wait() -> None:
        order.append("waited")
        layer.wait()

    ids = torch.tensor([[0], [0], [1]], dtype=torch.int32)
    compute_in_halves(
        compute, torch.ones(3, 2), torch.ones(3, 1), ids, np.array([[False], [False], [True]]), None, wait
    )
    assert order == ["computed 2", "waited", "computed 1"]
