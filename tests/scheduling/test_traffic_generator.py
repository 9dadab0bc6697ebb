"""Requests for real servers: from texts of several kinds, or from a log; and when they come."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.comparison.prompts import Text
from expertier.comparison.traffic import mixed_requests, read_request_log
from expertier.errors import ExpertierError, UnsupportedOptionError
from expertier.scheduling.arrivals import Arrivals, poisson_seconds

TEXTS = [Text(domain=f"kind {index % 4}", text=chr(97 + index % 4) * 900) for index in range(20)]


def tokenize(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_requests_are_a_mix_of_as_many_kinds_as_asked() -> None:
    asks = mixed_requests(TEXTS, tokenize, 12, domains=3, prompt=(5, 9), output=(2, 4), seed=1)
    assert sorted(Counter(ask.domain for ask in asks).values()) == [4, 4, 4]
    assert all(5 <= len(ask.prompt) <= 9 and 2 <= ask.output <= 4 for ask in asks)
    assert all(ask.prompt[0] == ord("a") + int(ask.domain[-1]) for ask in asks)
    assert asks == mixed_requests(TEXTS, tokenize, 12, domains=3, prompt=(5, 9), output=(2, 4), seed=1)
    assert asks != mixed_requests(TEXTS, tokenize, 12, domains=3, prompt=(5, 9), output=(2, 4), seed=2)


def test_more_kinds_than_there_are_is_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="4 domains"):
        mixed_requests(TEXTS, tokenize, 12, domains=5, prompt=(5, 9), output=(2, 4), seed=1)


def log(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_log_is_replayed_in_order_from_second_zero(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log",
        {"at": 12.5, "prompt": "b", "tokens": 3},
        "",
        {"at": 10, "prompt": [1, 2], "tokens": 2, "domain": "x"},
    )
    first, second = read_request_log(path, tokenize)
    assert (first.prompt, first.output, first.domain, first.at) == ((1, 2), 2, "x", 0.0)
    assert (second.prompt, second.at) == ((98,), 2.5)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((), "no request"),
        (("{",), "Line 1"),
        (({"prompt": "a", "tokens": 2}, {"prompt": "", "tokens": 2}), "Line 2"),
        (({"prompt": "a", "tokens": 0},), "Line 1"),
        (({"prompt": "a"},), "Line 1"),
        (({"prompt": "a", "tokens": 2, "at": "noon"},), "Line 1"),
        (("[1]",), "Line 1"),
        (({"prompt": "a", "tokens": 2, "at": 1}, {"prompt": "a", "tokens": 2}), "say when"),
    ],
)
def test_a_log_that_is_none_is_refused(tmp_path: Path, lines: tuple[object, ...], words: str) -> None:
    with pytest.raises(ExpertierError, match=words):
        read_request_log(log(tmp_path / "log", *lines), tokenize)
    with pytest.raises(ExpertierError, match="Cannot read"):
        read_request_log(tmp_path / "missing", tokenize)


@given(st.integers(0, 50), st.integers(1, 8), st.lists(st.integers(0, 8), max_size=80))
def test_a_closed_loop_never_has_more_requests_than_clients_and_asks_each_once(count, clients, finished):
    arrivals = Arrivals(count, clients=clients)
    there, asked = 0, []
    for done in [*finished, *[1] * (count + clients + 1)]:
        new = [number for number, _ in arrivals.due(0.0, there)]
        asked += new
        there += len(new)
        assert there <= clients
        there = max(0, there - done)
    assert asked == list(range(count)) and arrivals.over


def test_an_open_loop_does_not_wait_for_answers() -> None:
    arrivals = Arrivals(3, seconds=[0.5, 1.0, 4.0])
    assert arrivals.due(0.4, 0) == [] and arrivals.next_at == 0.5
    assert arrivals.due(1.0, 99) == [(0, 0.5), (1, 1.0)]
    assert not arrivals.over
    assert arrivals.due(9.0, 0) == [(2, 4.0)] and arrivals.over


def test_poisson_arrivals_ascend() -> None:
    seconds = poisson_seconds(100, 2.0, seed=0)
    assert (seconds[1:] >= seconds[:-1]).all() and seconds[0] > 0
