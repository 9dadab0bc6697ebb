"""What is worked out once for each request that waits changes nothing of what is decided."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.scheduling import Round
from expertier.scheduling.kept import KeptRows
from expertier.scheduling.strategies import Greedy, Similarity

WIDTH = 24
# Who waits at each decision, of a pool of paths: any, in any order, and one path may be that of several.
ROUNDS = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=8)


def paths(seed: int, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).random((count, WIDTH), dtype=np.float32) ** 3)


@settings(max_examples=100, deadline=None)
@given(ROUNDS, st.integers(0, 12), st.integers(0, 1000))
def test_products_are_those_of_the_paths_whoever_came_and_left(rounds, others, seed):
    pool = paths(seed, 31)
    kept = KeptRows(np.sqrt)
    for waiting in rounds:
        roots = np.sqrt([pool[number] for number in waiting])
        places = kept.find([pool[number] for number in waiting])
        with_others = roots @ roots[:others].T
        np.testing.assert_allclose(kept.products(places, places[:others]), with_others, rtol=1e-4)
        np.testing.assert_allclose(kept.squares(places), (roots**2).sum(axis=1), rtol=1e-4)
        np.testing.assert_allclose(kept.times(places, roots[:others]), with_others, rtol=1e-4)


def test_paths_that_are_gone_make_room_for_new_ones():
    kept = KeptRows(np.sqrt)
    kept.find(paths(0, 8))
    held = len(kept.rows)
    for seed in range(1, 20):
        kept.find(paths(seed, 8))
    assert len(kept.rows) == held


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.sqrt((rows**2).sum(axis=-1, keepdims=True)), 1e-6)


def nearest(alike: np.ndarray) -> float:
    """Mean of the six largest."""
    return float(np.sort(alike)[-6:].mean()) if len(alike) else 0.0


def similarity_scores(now: Round, chosen: list[int]) -> np.ndarray:
    """How well each fits in with who runs and who was chosen before it, by the formula as it is meant."""
    waiting = unit(np.sqrt(now.waiting) - np.sqrt(now.usual))
    batch = np.concatenate([unit(np.sqrt(now.running) - np.sqrt(now.usual)), waiting[chosen]])
    scores = np.full(len(waiting), -np.inf)
    for place in set(range(len(waiting))) - set(chosen):
        left = [other for other in range(min(64, len(waiting))) if other != place and other not in chosen]
        scores[place] = nearest(batch @ waiting[place]) - 0.5 * nearest(waiting[left] @ waiting[place])
    return scores


def greedy_scores(now: Round, chosen: list[int]) -> np.ndarray:
    absent = 1 - 0.5 * now.resident
    absent = absent * np.prod(1 - now.running, axis=0) * np.prod([1 - now.waiting[place] for place in chosen], axis=0)
    scores = -(np.array(now.waiting) @ absent)
    scores[chosen] = -np.inf
    return scores


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 20, 90]), st.integers(1, 4))
def test_requests_join_as_the_plain_formulas_say(seed, many, room):
    random = np.random.default_rng(seed)
    arms = [(Similarity(), similarity_scores), (Greedy(), greedy_scores)]
    waiting = [random.random(WIDTH, dtype=np.float32) ** 3 for _ in range(many)]
    for _ in range(4):
        usual = random.random(WIDTH, dtype=np.float32) ** 3
        now = Round(  # of some of those that wait nothing is known
            waiting=[usual if place % 5 == 2 else path for place, path in enumerate(waiting)],
            running=random.random((3, WIDTH), dtype=np.float32) ** 3,
            usual=usual,
            resident=(random.random(WIDTH) < 0.5).astype(np.float32),
            room=min(room, many),
        )
        for batcher, score in arms:
            answer = batcher.choose(now).tolist()
            assert len(answer) == now.room
            for number, place in enumerate(answer):
                scores = score(now, answer[:number])
                assert scores[place] >= scores.max() - 1e-3
        gone = set(answer)
        waiting = [path for place, path in enumerate(waiting) if place not in gone]
        waiting += [random.random(WIDTH, dtype=np.float32) ** 3 for _ in gone]
