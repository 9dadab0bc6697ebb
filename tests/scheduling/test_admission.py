"""Who joins next: the bounds on unfairness hold whatever a batcher wishes for."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.errors import UnsupportedOptionError
from expertier.scheduling import BATCHERS, Admission, Fairness, PathBook, Round, Worth, make_batcher

LAYERS, EXPERTS, TOP_K = 3, 8, 2


class Whim:
    """A batcher that wants whatever a seed says: the worst a batcher can be that keeps to the protocol."""

    name = "whim"

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def choose(self, now: Round) -> np.ndarray:
        return self._random.permutation(len(now.waiting))[: now.room]


class NewestFirst:
    name = "newest"

    def choose(self, now: Round) -> np.ndarray:
        return np.arange(len(now.waiting))[::-1][: now.room]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def taught_book() -> PathBook:
    """A book that knows tokens 0..15: an even token uses the first experts, an odd one the last."""
    book = PathBook(LAYERS, EXPERTS)
    tokens = np.arange(16)
    routes = np.where((tokens % 2)[:, None, None], [[6, 7]], [[0, 1]]) * np.ones((16, LAYERS, 1), np.int64)
    book.observe(["teacher"] * 16, tokens, routes)
    book.forget("teacher")
    return book


def take(admission: Admission, room: int) -> list:
    chosen = admission.propose(room)
    for request in chosen:
        admission.joined(request)
    return chosen


# What happens to an admission: requests of a priority arrive, some join, some are cancelled, time passes.
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 2)),
        st.tuples(st.just("join"), st.integers(0, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 5)),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(0, 6), st.integers(1, 20), st.integers(0, 1000))
def test_no_limit_of_fairness_is_ever_broken_and_nobody_is_lost(events, overtaken, steps, seed):
    admission = Admission(
        Whim(seed),
        taught_book(),
        fairness=Fairness(overtaken=overtaken, steps=steps, seconds=1e9),
        worth=Worth("on"),
        clock=Clock(),
    )
    waiting: dict[int, int] = {}  # our own books: priority by request, in order of arrival
    passed: dict[int, int] = {}
    due: dict[int, int] = {}
    turn: dict[int, int] = {}
    arrived = joined = now = 0
    for kind, value in [*events, ("join", 1000)]:
        if kind == "arrive":
            admission.arrive(arrived, [arrived % 16] * 3, priority=value)
            due[arrived] = joined + sum((priority, other) < (value, arrived) for other, priority in waiting.items())
            waiting[arrived], passed[arrived] = value, 0
            arrived += 1
        elif kind == "step":
            for _ in range(value):
                admission.step()
            now += value
        elif kind == "cancel":
            if value in waiting:
                for other, priority in waiting.items():
                    due[other] -= (priority, other) > (waiting[value], value)
                del waiting[value]
            admission.leave(value)
        else:
            chosen = admission.propose(value)
            assert len(chosen) == len(set(chosen)) == min(value, len(waiting))
            for request in chosen:
                mine = waiting.pop(request)
                assert all(priority >= mine for priority in waiting.values()), "a more urgent request waits"
                older = [other for other, priority in waiting.items() if priority == mine and other < request]
                for other in older:
                    passed[other] += 1
                    assert passed[other] <= overtaken
                    assert other not in turn or now - turn[other] < steps, "an overdue request was overtaken"
                admission.joined(request)
                joined += 1
                for other in waiting:
                    if joined > due[other]:
                        turn.setdefault(other, now)
    assert not waiting and not admission.waiting()
    assert admission.stats.most_overtaken <= overtaken


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 10), st.integers(0, 1000))
def test_nobody_falls_further_behind_first_come_than_the_bound(requests, room, overtaken, seed):
    admission = Admission(Whim(seed), taught_book(), fairness=Fairness(overtaken=overtaken), worth=Worth("on"))
    for request in range(requests):
        admission.arrive(request, [request % 16])
    order = []
    while admission.waiting():
        order += take(admission, room)
    assert sorted(order) == list(range(requests))
    assert all(place <= request + overtaken for place, request in enumerate(order))


def test_a_request_that_waited_long_enough_after_its_turn_goes_first():
    clock = Clock()
    admission = Admission(NewestFirst(), taught_book(), worth=Worth("on"), fairness=Fairness(seconds=5.0), clock=clock)
    for request in range(6):
        admission.arrive(request, [request])
    assert take(admission, 1) == [5]
    clock.now = 4.9
    assert take(admission, 1) == [4]
    clock.now = 5.0
    assert take(admission, 1) == [0]


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("overtaken", -1),
        ("overtaken", 1.5),
        ("steps", True),
        ("seconds", float("nan")),
        ("seconds", "soon"),
        ("steps", "x"),
    ],
)
def test_a_limit_that_is_none_is_refused_with_its_name(limit, value):
    with pytest.raises(UnsupportedOptionError, match=f"fairness_{limit}="):
        Fairness.from_options({f"fairness_{limit}": value})


def test_limits_come_from_options_then_from_the_environment(monkeypatch):
    monkeypatch.setenv("EXPERTIER_FAIRNESS_STEPS", "7")
    monkeypatch.setenv("EXPERTIER_FAIRNESS_OVERTAKEN", "9")
    chosen = Fairness.from_options({"fairness_overtaken": 3, "fairness_seconds": None, "budget": "50%"})
    assert chosen == Fairness(overtaken=3, steps=7)
    monkeypatch.setenv("EXPERTIER_FAIRNESS_STEPS", "many")
    with pytest.raises(UnsupportedOptionError, match="EXPERTIER_FAIRNESS_STEPS"):
        Fairness.from_options({})


def test_nobody_knows_what_is_resident_where_nobody_is_compared():
    admission = Admission(Whim(0), taught_book())
    admission.arrive("only", [1])
    assert not admission.compares
    admission.arrive("another", [2])
    assert admission.compares
    admission.worth = Worth("off")
    assert not admission.compares


class Watching(NewestFirst):
    """Notes how many it may choose among."""

    def __init__(self) -> None:
        self.most = 0

    def choose(self, now: Round) -> np.ndarray:
        self.most = max(self.most, len(now.waiting))
        return super().choose(now)


class CountingBook(PathBook):
    """Notes whose prompts were looked up."""

    def __init__(self) -> None:
        super().__init__(LAYERS, EXPERTS)
        self.observe(["teacher"] * 16, np.arange(16), np.zeros((16, LAYERS, 1), np.int64))
        self.looked_up: set[int] = set()

    def of_waiting(self, request, tokens):
        self.looked_up.add(request)
        return super().of_waiting(request, tokens)


def test_however_many_wait_a_choice_is_among_the_first_of_them_and_everybody_is_served():
    batcher, book = Watching(), CountingBook()
    admission = Admission(batcher, book, worth=Worth("on"))
    for request in range(2000):
        admission.arrive(request, [request % 16] * 4)
    served = take(admission, 4)
    assert batcher.most == 256 and len(book.looked_up) <= 300
    while admission.waiting():
        served += take(admission, 100)
    assert sorted(served) == list(range(2000))


def test_who_is_cancelled_does_not_delay_the_turn_of_those_behind():
    clock = Clock()
    admission = Admission(NewestFirst(), taught_book(), worth=Worth("on"), fairness=Fairness(seconds=1.0), clock=clock)
    for request in range(5):
        admission.arrive(request, [request])
    admission.leave(0)
    admission.leave(0)
    assert take(admission, 1) == [4]
    clock.now = 1.0
    assert take(admission, 2) == [1, 3]


@pytest.mark.parametrize("name", sorted(BATCHERS))
def test_every_batcher_serves_all_requests_once(name):
    admission = Admission(make_batcher(name), taught_book())
    for request in range(20):
        admission.arrive(request, [request % 16, (request + 2) % 16])
    order = []
    while admission.waiting():
        order += take(admission, 3)
    assert sorted(order) == list(range(20))


@pytest.mark.parametrize("name", ["similarity", "greedy", "balanced"])
def test_requests_that_share_experts_join_together(name):
    admission = Admission(make_batcher(name), taught_book())
    for request in range(8):
        admission.arrive(request, [request, request + 2])
    assert sorted(take(admission, 4)) in ([0, 2, 4, 6], [1, 3, 5, 7])


@pytest.mark.parametrize("name", ["similarity", "greedy"])
def test_those_that_run_draw_requests_like_themselves(name):
    admission = Admission(make_batcher(name), taught_book())
    admission.arrive("runs", [1])
    take(admission, 1)
    admission.observe(["runs"], np.array([1]), np.array([[[6, 7]] * LAYERS]))
    for request in range(8):
        admission.arrive(request, [request, request + 2])
    assert sorted(take(admission, 4)) == [1, 3, 5, 7]


@pytest.mark.parametrize("name", sorted(set(BATCHERS) - {"random"}))
def test_identical_requests_and_a_single_one_join_in_order(name):
    admission = Admission(make_batcher(name), taught_book())
    admission.arrive("only", [3])
    assert take(admission, 4) == ["only"]
    for request in range(6):
        admission.arrive(request, [3, 3])
    assert take(admission, 2) == [0, 1]


def test_without_paths_requests_join_in_order():
    admission = Admission(make_batcher("similarity"), PathBook(LAYERS, EXPERTS))
    for request in range(5):
        admission.arrive(request, [request])
    assert take(admission, 3) == [0, 1, 2]


def test_a_crowd_of_prompts_nobody_knows_does_not_keep_others_from_being_known():
    admission = Admission(make_batcher("similarity"), taught_book())
    for request in range(40):
        admission.arrive(request, [100 + request])
    admission.arrive("runs", [1])
    admission.joined("runs")
    admission.observe(["runs"], np.array([1]), np.array([[[6, 7]] * LAYERS]))
    admission.arrive("like it", [3, 5])
    for _ in range(4):
        proposed = admission.propose(1)
    assert proposed == ["like it"]


class Raising:
    name = "raising"

    def choose(self, now: Round) -> np.ndarray:
        raise RuntimeError("no idea")


class Nonsense:
    name = "nonsense"

    def choose(self, now: Round) -> np.ndarray:
        return np.array([0, 0, 99])


@pytest.mark.parametrize("broken", [Raising(), Nonsense()])
def test_a_batcher_that_fails_is_replaced_by_the_order_of_arrival_and_said_once(broken, caplog):
    admission = Admission(broken, taught_book())
    for request in range(6):
        admission.arrive(request, [request])
    with caplog.at_level(logging.WARNING, logger="expertier"):
        assert take(admission, 2) == [0, 1]
        assert take(admission, 2) == [2, 3]
    assert len(caplog.records) == 1 and broken.name in caplog.text


def test_a_name_that_waits_already_is_not_queued_twice():
    admission = Admission()
    admission.arrive("a")
    admission.arrive("a")
    assert take(admission, 5) == ["a"]


def test_an_unknown_batcher_is_refused_with_those_there_are():
    with pytest.raises(UnsupportedOptionError, match="similarity"):
        make_batcher("best")


def test_a_choice_that_saves_nothing_leaves_the_order_of_arrival():
    admission = Admission(NewestFirst(), taught_book())
    for request in range(6):
        admission.arrive(request, [2, 4])
    assert take(admission, 2) == [0, 1]


def trial(worth: Worth, loads_without: int, loads_with: int) -> None:
    """Hold, then one trial."""
    for _ in range(10 + 2 * 2 * 4):
        worth.step(8, loads_with if worth.on else loads_without)


def test_regrouping_that_does_not_save_loads_turns_itself_off_and_is_tried_again():
    worth = Worth(block=4, hold=10)
    assert worth.on
    trial(worth, loads_without=40, loads_with=44)
    assert not worth.on
    trial(worth, loads_without=40, loads_with=30)
    assert worth.on


def test_regrouping_that_saves_loads_stays():
    worth = Worth(block=4, hold=10)
    trial(worth, loads_without=40, loads_with=36)
    assert worth.on


def test_while_regrouping_is_off_requests_join_in_order():
    admission = Admission(make_batcher("similarity"), taught_book(), worth=Worth("off"))
    for request in range(6):
        admission.arrive(request, [request])
    assert take(admission, 4) == [0, 1, 2, 3]
