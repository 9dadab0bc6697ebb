"""Token groups: every token once, with all its experts, within the capacity."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier_vllm.grouping import token_groups


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, int, np.ndarray]:
    experts = draw(st.integers(1, 24))
    top_k = draw(st.integers(1, min(experts, 6)))
    tokens = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    routes = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int64)
    return routes, draw(st.integers(top_k, experts)), rng.random(experts) < draw(st.floats(0, 1))


@given(steps())
@settings(max_examples=200, deadline=None)
def test_every_token_is_computed_once_with_all_its_experts(step: tuple[np.ndarray, int, np.ndarray]) -> None:
    routes, capacity, resident = step
    seen: list[int] = []
    for tokens, wanted in token_groups(routes, capacity, resident):
        assert len(tokens)
        assert 0 < len(wanted) <= capacity
        assert set(routes[tokens].ravel()) == set(wanted)
        seen += tokens.tolist()
    assert sorted(seen) == list(range(len(routes)))


def test_tokens_that_resident_experts_serve_come_first() -> None:
    routes = np.array([[0, 1], [2, 3], [0, 1], [4, 5]])
    resident = np.array([False, False, True, True, False, False])
    tokens, wanted = next(token_groups(routes, 2, resident))
    assert tokens.tolist() == [1]
    assert wanted.tolist() == [2, 3]


def test_a_group_takes_in_all_tokens_that_need_nothing_more() -> None:
    routes = np.array([[0, 1], [2, 3], [1, 0], [0, 2], [3, 2]])
    groups = [tokens.tolist() for tokens, _ in token_groups(routes, 2, np.zeros(4, bool))]
    assert groups == [[0, 2], [1, 4], [3]]
