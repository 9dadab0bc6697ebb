"""Sequences are followed by the positions of their tokens: what the predictor is told is what the engine computes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertier.routing.sequences import Growth, Sequences, Span


class Mirror:
    """What whoever listens to the growths knows."""

    def __init__(self, most: int = 64) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.sequences = Sequences(lambda number: self.tokens.pop(number), most=most)

    def step(self, *spans: Span) -> list[Growth | None]:
        grown = self.sequences.step(spans)
        for growth in grown:
            if growth is not None and growth.sequence >= 0:
                old = self.tokens.get(growth.sequence, [])
                assert growth.keep <= len(old)
                self.tokens[growth.sequence] = old[: growth.keep] + growth.tokens.tolist()
        return grown


def test_a_sequence_grows_chunk_by_chunk_and_token_by_token() -> None:
    mirror = Mirror()
    [first] = mirror.step(Span(key=0, position=0, tokens=[1, 2, 3]))
    [second] = mirror.step(Span(key=0, position=3, tokens=[4]))
    assert first is not None and second is not None
    assert (first.sequence, first.keep, first.rows) == (second.sequence, 0, 3)
    assert (second.keep, second.rows) == (3, 1)
    assert mirror.tokens == {0: [1, 2, 3, 4]}


def test_a_sequence_that_goes_back_keeps_what_comes_before() -> None:
    mirror = Mirror()
    mirror.step(Span(key="a", position=0, tokens=[1, 2, 3, 4]))
    [growth] = mirror.step(Span(key="a", position=2, tokens=[9]))
    assert growth is not None and growth.keep == 2
    assert mirror.tokens == {0: [1, 2, 9]}


def test_a_prefix_that_nobody_computed_is_asked_for_once() -> None:
    asked = []

    def before() -> list[int]:
        asked.append(1)
        return [7, 8]

    mirror = Mirror()
    [growth] = mirror.step(Span(key="a", position=2, tokens=[9], before=before))
    mirror.step(Span(key="a", position=3, tokens=[10], before=before))
    assert growth is not None and (growth.tokens.tolist(), growth.rows) == ([7, 8, 9], 1)
    assert mirror.tokens == {0: [7, 8, 9, 10]}
    assert len(asked) == 1


def test_a_gap_makes_a_sequence_begin_again() -> None:
    mirror = Mirror()
    mirror.step(Span(key=0, position=0, tokens=[1, 2]))
    [growth] = mirror.step(Span(key=0, position=10, tokens=[3]))
    assert growth is not None and growth.keep == 0
    assert mirror.tokens == {0: [3]}


def test_input_without_ids_ends_what_was_known_and_what_follows_counts_again() -> None:
    mirror = Mirror()
    mirror.step(Span(key=0, position=0, tokens=[1, 2]))
    assert mirror.step(Span(key=0, position=2, tokens=None)) == [None]
    assert mirror.tokens == {}
    mirror.step(Span(key=0, position=300, tokens=[5]))
    assert list(mirror.tokens.values()) == [[5]]


def test_the_sequence_not_heard_of_for_longest_is_forgotten_first() -> None:
    mirror = Mirror(most=2)
    for key in "abac":
        mirror.step(Span(key=key, position=0, tokens=[ord(key)]))
    assert sorted(mirror.tokens.values()) == [[ord("a")], [ord("c")]]
    assert len(mirror.sequences) == 2


OPERATION = st.tuples(
    st.integers(0, 3),  # sequence
    st.integers(0, 12),  # cut to so many tokens at most
    st.booleans(),  # whether to cut
    st.lists(st.integers(0, 999), min_size=1, max_size=5),
)


@given(st.lists(OPERATION, max_size=30), st.integers(1, 4))
def test_what_is_told_is_always_the_end_of_what_the_engine_has(
    operations: list[tuple[int, int, bool, list[int]]], most: int
) -> None:
    mirror = Mirror(most=most)
    truth: dict[int, list[int]] = {}
    for key, cut, cuts, tokens in operations:
        old = truth.get(key, [])
        position = min(cut, len(old)) if cuts else len(old)
        truth[key] = old[:position] + tokens
        [growth] = mirror.step(Span(key=key, position=position, tokens=tokens))
        assert growth is not None
        told = mirror.tokens[growth.sequence]
        assert told == truth[key][len(truth[key]) - len(told) :]
        assert len(told) >= len(tokens)
        if most == 4:  # none was forgotten
            assert told == truth[key]
    assert len(mirror.tokens) <= most
