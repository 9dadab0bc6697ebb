"""Arms of a comparison of schedulers, in engines that stand in for real ones."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from expertier.comparison.prompts import Text
from expertier.comparison.schedulers import Queue, SchedulerComparison, serve_queue
from expertier.comparison.traffic import Ask
from expertier.scheduling import Admission
from expertier.simulation.scheduling import TrafficPlan
from expertier.telemetry import Stats

PLAN = TrafficPlan(requests=6, clients=6, domains=1, prompt=(2, 4), output=(2, 3), earlier=2, batch=2, budget=1)
TEXTS = [Text(domain="words", text=f"{number} one two three four five six") for number in range(4)]


class EveryTokenAtOnce:
    """An engine that gives everybody a token in every step."""

    lingers = 0.0

    def __init__(self) -> None:
        self.admission = Admission()
        self.asked: list[Ask] = []
        self._open: dict[int, list[int]] = {}  # tokens so far, and wanted

    def mode_line(self) -> str:
        return "a stand-in"

    def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def submit(self, number: int, ask: Ask) -> None:
        self.asked.append(ask)
        self._open[number] = [0, ask.output]

    def number(self, name: Hashable) -> int:
        return int(str(name))

    def step(self) -> list[tuple[int, int, bool]]:
        told = []
        for number, request in list(self._open.items()):
            request[0] += 1
            if request[0] == request[1]:
                del self._open[number]
            told.append((number, request[0], request[0] == request[1]))
        return told

    def stats(self) -> Stats:
        return Stats()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("load", [None, 0.9])
def test_engines_side_by_side_have_computed_the_same(load: float | None) -> None:
    servers = [EveryTokenAtOnce(), EveryTokenAtOnce()]
    plan = TrafficPlan(**{**vars(PLAN), "load": load})
    comparison = SchedulerComparison(servers, TEXTS, plan, layers=1)
    comparison.prepare()
    runs = comparison.run(["fcfs", "random"], seed=0)
    assert [run.arm for run in runs] == ["fcfs", "random"]
    assert servers[0].asked == servers[1].asked
    assert len(servers[0].asked) == PLAN.earlier + PLAN.requests * (1 if load is None else 2)


def test_answers_are_timed_from_the_moment_a_request_comes() -> None:
    asks = [Ask(prompt=(1, 2), output=2), Ask(prompt=(1,), output=1)]
    served = serve_queue(EveryTokenAtOnce(), Queue(asks=asks, seconds=[0.0, 0.2], clients=0), layers=1)
    assert served.seconds >= 0.2
    assert served.answered[0] >= served.first_token[0] > 0
    assert 0 < served.answered[1] < served.seconds - 0.2 + 1e-6
    assert served.answered[1] == served.first_token[1]
