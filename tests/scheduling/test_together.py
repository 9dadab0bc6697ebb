"""Prompts share a step where that saves loads: places stay empty for a bounded while, and never for nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.scheduling import Admission, Fairness, Together, Worth, make_batcher
from scheduling.test_admission import EXPERTS, LAYERS, Clock, taught_book

PLACES = 8


def serve(together: Together, *, decode: int, prompt: int, requests: int = 40, gap: int = 16, prompts: int = 1) -> None:
    """Let requests come one by one: `prompts` steps with prompts each, then `gap` without."""
    for _ in range(requests):
        together.left()
        together.joined()
        for _ in range(prompts):
            together.step(0, prompt)
        for _ in range(gap):
            together.step(PLACES, decode)


def test_nothing_is_known_at_first_so_everybody_joins_at_once():
    assert Together().size(PLACES) == 1


def test_two_join_together_where_prompts_load_much_more_than_other_steps():
    together = Together()
    serve(together, decode=49, prompt=124)  # the reference model, half of its experts resident
    assert together.size(PLACES) == 2


def test_at_most_a_quarter_of_the_places_wait():
    together = Together()
    serve(together, decode=49, prompt=5000, gap=2)
    assert [together.size(places) for places in (1, 4, 7, 8, 16, 64)] == [1, 1, 1, 2, 4, 16]


@pytest.mark.parametrize(
    "loads",
    [
        {"decode": 0, "prompt": 0},  # everything is resident
        {"decode": 0, "prompt": 90},  # all that answers use is
        {"decode": 130, "prompt": 130},  # every step loads all that is absent
        {"decode": 130, "prompt": 120},
        {"decode": 128, "prompt": 133, "gap": 2},  # nearly all
        {"decode": 49, "prompt": 124, "prompts": 4},  # prompts that fill steps of their own
        {"decode": 49, "prompt": 60, "gap": 200},  # places come free too seldom
    ],
)
def test_nobody_waits_where_prompts_have_nothing_to_share(loads):
    together = Together()
    serve(together, **loads)
    assert together.size(PLACES) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 10_000), st.booleans(), st.booleans()), min_size=20, max_size=80
    ),
    st.integers(1, 300),
)
def test_whatever_steps_load_the_answer_is_between_one_and_a_quarter(steps, places):
    together = Together()
    for tokens, loads, joined, left in steps:
        if joined:
            together.joined()
        if left:
            together.left()
        together.step(tokens, loads)
    assert 1 <= together.size(places) <= max(1, places // 4)


def busy(clock: Clock | None = None, **limits) -> Admission:
    """Eight run, one is about to leave; steps with prompts are dear and many wait."""
    admission = Admission(
        make_batcher("similarity"),
        taught_book(),
        worth=Worth("on"),
        fairness=Fairness(**limits),
        clock=clock or Clock(),
    )
    for request in range(PLACES):
        admission.arrive(request, [request])
        admission.joined(request)
    serve(admission.together, decode=49, prompt=124)
    for request in range(PLACES, 3 * PLACES):
        admission.arrive(request, [request % 16])
    admission.leave(0)
    return admission


def test_a_place_stays_empty_until_a_second_one_is_free():
    admission = busy()
    assert admission.holds(1)
    admission.leave(1)
    assert not admission.holds(2)
    assert admission.stats.held == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.lists(st.sampled_from(["hold", "step", "arrive"]), max_size=300))
def test_no_place_stays_empty_longer_than_the_limit(limit, events):
    admission = busy(held=limit)
    held = number = 0
    for event in events:
        if event == "arrive":
            number += 1
            admission.arrive(100 + number, [1])
        elif event == "step":
            admission.step(PLACES - 1, 49)
        elif admission.holds(1):
            held += 1
            assert held <= limit
        else:
            held = 0


def test_a_limit_in_seconds_ends_it_too():
    clock = Clock()
    admission = busy(clock, seconds=2.0)
    assert admission.holds(1)
    clock.now = 1.9
    assert admission.holds(1)
    clock.now = 2.0
    assert not admission.holds(1)


def test_nobody_waits_for_company_whose_turn_is_overdue():
    clock = Clock()
    admission = busy(clock, seconds=5.0)
    admission.joined(3 * PLACES - 1)  # the last overtakes everybody
    for request in range(1, 4):
        admission.leave(request)
        admission.joined(3 * PLACES - 1 - request)
    clock.now = 5.0
    assert not admission.holds(1)


def test_an_urgent_request_does_not_wait_for_others():
    admission = busy()
    admission.arrive("urgent", [1], priority=-1)
    assert not admission.holds(1)
    admission.arrive("as urgent", [1], priority=-1)
    assert admission.holds(1)


@pytest.mark.parametrize("wait", ["nobody runs", "one waits", "in order", "off"])
def test_a_place_is_filled_at_once_where_there_is_nothing_to_wait_for(wait):
    admission = busy()
    if wait == "nobody runs":
        for request in range(1, PLACES):
            admission.leave(request)
    elif wait == "one waits":
        for request in range(PLACES + 1, 3 * PLACES):
            admission.leave(request)
    elif wait == "in order":
        admission.batcher = make_batcher("fcfs")
    else:
        admission.worth = Worth("off")
    assert not admission.holds(1)


def test_what_fails_ends_it():
    admission = busy()
    admission.observe(["a"], np.zeros(1, np.int64), np.zeros((1, LAYERS, EXPERTS + 1, 2), np.int64))
    assert admission.stats.failures == 1
    assert not admission.holds(1)
