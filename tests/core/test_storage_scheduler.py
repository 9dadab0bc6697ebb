"""I/O threads: who overtakes whom, and that every request completes exactly once whatever happens to it."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.errors import ExpertLoadError
from expertier.storage import BACKGROUND, DEMAND, PAGE, PREFETCH, IoScheduler, ReadRequest
from support.fake_engine import WATCHDOG, ScriptedFile, Worker, aligned

pytestmark = pytest.mark.timeout(60)

CHUNK = PAGE
FILE_PAGES = 64


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scheduler") / "data.bin"
    file.write_bytes(np.random.default_rng(1).bytes(FILE_PAGES * PAGE))
    return file


class Ledger:
    """Completions as they arrive."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, BaseException | None, bool]] = []
        self._change = threading.Condition()

    def __call__(self, request: ReadRequest, error: BaseException | None, cancelled: bool) -> None:
        with self._change:
            self.done.append((request.tag, error, cancelled))
            self._change.notify_all()

    def expect(self, count: int) -> None:
        with self._change:
            assert self._change.wait_for(lambda: len(self.done) >= count, WATCHDOG), f"only {self.done} completed"
        assert len(self.done) == count


@contextmanager
def scheduler(path: Path, threads: int = 1) -> Iterator[tuple[IoScheduler, ScriptedFile, Ledger]]:
    file, ledger = ScriptedFile(path), Ledger()
    io = IoScheduler(ledger, threads=threads, chunk_bytes=CHUNK)
    try:
        yield io, file, ledger
    finally:
        file.let_all()
        io.close()
        file.close()


def request(
    file: ScriptedFile, page: int, pages: int, priority: int = DEMAND, tag: Any = None, **more: Any
) -> ReadRequest:
    view = memoryview(aligned(pages * PAGE))
    view[:] = bytes(len(view))
    return ReadRequest(
        file=file, offset=page * PAGE, view=view, needed=pages * PAGE, priority=priority, tag=tag, **more
    )


def pages_read(file: ScriptedFile) -> list[int]:
    return [offset // PAGE for offset, _ in file.reads]


def test_a_request_is_read_in_chunks_and_completes_once_with_its_tag(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        wanted = request(file, 3, 4, tag="seven")
        io.submit([wanted])
        ledger.expect(1)
        assert ledger.done == [("seven", None, False)]
        assert bytes(wanted.view) == path.read_bytes()[3 * PAGE : 7 * PAGE]
        assert pages_read(file) == [3, 4, 5, 6]
        assert io.bytes_read == 4 * PAGE


def test_a_small_remainder_is_read_with_the_chunk_before_it(path: Path) -> None:
    file, ledger = ScriptedFile(path), Ledger()
    io = IoScheduler(ledger, threads=1, chunk_bytes=8 * PAGE)
    io.submit([request(file, 0, 17), request(file, 20, 18)])
    ledger.expect(2)
    assert [(offset // PAGE, size // PAGE) for offset, size in file.reads] == [
        (0, 8),
        (8, 9),
        (20, 8),
        (28, 8),
        (36, 2),
    ]
    io.close()
    file.close()


def test_demand_overtakes_a_running_prefetch_between_chunks(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        file.hold()
        io.submit([request(file, 0, 4, PREFETCH, "ahead")])
        file.await_held(1)
        io.submit([request(file, 10, 2, DEMAND, "needed")])
        file.let_all()
        ledger.expect(2)
        assert pages_read(file) == [0, 10, 11, 1, 2, 3]
        assert [tag for tag, _, _ in ledger.done] == ["needed", "ahead"]
        assert io.prefetch_bytes_read == 4 * PAGE


def test_a_promoted_prefetch_overtakes_the_others(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        file.hold()
        first, second = request(file, 0, 3, PREFETCH, "first"), request(file, 10, 2, PREFETCH, "second")
        io.submit([first, second])
        file.await_held(1)
        io.promote(second)
        io.promote(second)
        file.let_all()
        ledger.expect(2)
        assert pages_read(file) == [0, 10, 11, 1, 2]
        assert io.prefetch_bytes_read == 3 * PAGE, "what was promoted before it was read counts as demand"


def test_what_is_in_no_hurry_is_overtaken_by_a_prefetch_between_chunks(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        file.hold()
        io.submit([request(file, 0, 3, BACKGROUND)])
        file.await_held(1)
        io.submit([request(file, 10, 2, PREFETCH)])
        file.let_all()
        ledger.expect(2)
        assert pages_read(file) == [0, 10, 11, 1, 2]


def test_in_the_background_threads_do_not_share_a_request_and_rest_after_each_chunk(path: Path) -> None:
    times: list[tuple[float, float]] = []

    class Slow(ScriptedFile):
        def read_into(self, view: memoryview, offset: int, needed: int) -> None:
            began = time.monotonic()
            super().read_into(view, offset, needed)
            time.sleep(0.002)
            times.append((began, time.monotonic()))

    file, ledger = Slow(path), Ledger()
    with closing(IoScheduler(ledger, threads=2, chunk_bytes=CHUNK)) as io, closing(file):
        io.submit([request(file, 0, 4, BACKGROUND)])
        ledger.expect(1)
    assert len(times) == 4
    for (began, ended), (following, _) in itertools.pairwise(times):
        assert following - ended >= 0.95 * (ended - began)  # half of the time, at most


def test_a_promoted_read_in_the_background_does_not_rest(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        wanted = request(file, 0, 3, BACKGROUND)
        file.hold()
        io.submit([wanted])
        file.await_held(1)
        io.promote(wanted)
        io.submit([request(file, 10, 1, PREFETCH)])
        file.let_all()
        ledger.expect(2)
        assert pages_read(file) == [0, 1, 2, 10]


def test_promoting_what_is_wholly_in_flight_or_done_changes_nothing(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        file.hold()
        only = request(file, 0, 1, PREFETCH)
        io.submit([only])
        file.await_held(1)
        io.promote(only)
        file.let_all()
        ledger.expect(1)
        io.promote(only)
        io.submit([request(file, 5, 1)])
        ledger.expect(2)


def test_all_threads_share_the_chunks_of_a_single_request(path: Path) -> None:
    with scheduler(path, threads=3) as (io, file, ledger):
        file.hold()
        io.submit([request(file, 0, 6)])
        file.await_held(3)
        file.let_all()
        ledger.expect(1)


def test_a_request_nobody_began_is_cancelled_without_a_read(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        file.hold()
        queued = request(file, 10, 2, PREFETCH, "queued")
        io.submit([request(file, 0, 1, DEMAND, "busy"), queued])
        file.await_held(1)
        io.cancel(queued)
        assert ledger.done == [("queued", None, True)]
        io.cancel(queued)
        file.let_all()
        ledger.expect(2)
        assert pages_read(file) == [0]


def test_a_running_request_is_cancelled_when_its_chunk_in_flight_has_ended(path: Path) -> None:
    with scheduler(path, threads=2) as (io, file, ledger):
        file.hold()
        running = request(file, 0, 5, PREFETCH, "running")
        io.submit([running])
        file.await_held(2)
        io.cancel(running)
        assert not ledger.done
        file.let(1)
        io.submit([request(file, 10, 1, DEMAND, "next")])
        file.await_held(2)
        assert not ledger.done, "one chunk is still being written"
        file.let_all()
        ledger.expect(2)
        assert ("running", None, True) in ledger.done
        assert sorted(pages_read(file)) == [0, 1, 10]


def test_a_cancel_that_comes_too_late_leaves_a_complete_read(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        file.hold()
        last = request(file, 2, 1, PREFETCH, "last")
        io.submit([last])
        file.await_held(1)
        io.cancel(last)
        file.let_all()
        ledger.expect(1)
        assert ledger.done == [("last", None, False)]
        assert bytes(last.view) == path.read_bytes()[2 * PAGE : 3 * PAGE]
        io.cancel(last)
        ledger.expect(1)


def test_an_error_ends_a_request_once_and_its_other_chunks_are_not_read(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        file.fail(PAGE, 1)
        io.submit([request(file, 0, 6, tag="broken"), request(file, 10, 1, tag="whole")])
        ledger.expect(2)
        (tag, error, cancelled), whole = ledger.done
        assert (tag, cancelled) == ("broken", False)
        assert isinstance(error, ExpertLoadError)
        assert whole == ("whole", None, False)
        assert pages_read(file) == [0, 1, 10]


def test_an_error_is_reported_after_the_chunks_in_flight_have_ended(path: Path) -> None:
    with scheduler(path, threads=2) as (io, file, ledger):
        file.fail(0, 1)
        file.hold()
        io.submit([request(file, 0, 6, tag="broken")])
        file.await_held(2)
        file.hold(PAGE, PAGE)
        io.submit([request(file, 10, 1, tag="whole")])
        ledger.expect(1)
        assert ledger.done[0][0] == "whole", "the broken one still has a write under way"
        file.let_all()
        ledger.expect(2)
        assert isinstance(ledger.done[1][1], ExpertLoadError)


def test_a_cancelled_request_whose_last_chunk_fails_completes_once(path: Path) -> None:
    with scheduler(path) as (io, file, ledger):
        file.hold()
        file.fail(0, 1)
        broken = request(file, 0, 4, PREFETCH, "broken")
        io.submit([broken])
        file.await_held(1)
        io.cancel(broken)
        file.let_all()
        ledger.expect(1)
        assert isinstance(ledger.done[0][1], ExpertLoadError)
        io.submit([request(file, 9, 1)])
        ledger.expect(2)


def test_a_check_sees_all_bytes_and_its_objection_is_the_error(path: Path) -> None:
    seen = []

    def object_to(view: memoryview) -> None:
        seen.append(bytes(view))
        raise ValueError("not what it should be")

    with scheduler(path, threads=2) as (io, file, ledger):
        io.submit([request(file, 1, 3, check=object_to)])
        ledger.expect(1)
        assert seen == [path.read_bytes()[PAGE : 4 * PAGE]]
        assert isinstance(ledger.done[0][1], ValueError)


def test_close_ends_the_chunks_in_flight_and_completes_the_queue_as_cancelled(path: Path) -> None:
    file, ledger = ScriptedFile(path), Ledger()
    io = IoScheduler(ledger, threads=1, chunk_bytes=CHUNK)
    file.hold()
    io.submit([request(file, 0, 3, tag="running"), request(file, 10, 1, tag="queued")])
    io.submit([request(file, 20, 1, PREFETCH, tag="ahead")])
    file.await_held(1)
    closing = Worker(io.close)
    ledger.expect(2)
    assert {(tag, cancelled) for tag, _, cancelled in ledger.done} == {("queued", True), ("ahead", True)}
    file.let_all()
    closing.join()
    assert [tag for tag, _, _ in ledger.done][2:] == ["running"]
    assert pages_read(file) == [0]
    io.close()
    with pytest.raises(RuntimeError, match="closed"):
        io.submit([request(file, 0, 1)])
    assert not any(thread.is_alive() for thread in io._threads)
    file.close()


def test_close_may_be_called_from_a_completion(path: Path) -> None:
    file, ended = ScriptedFile(path), threading.Event()

    def on_done(done: ReadRequest, error: BaseException | None, cancelled: bool) -> None:
        io.close()
        ended.set()

    io = IoScheduler(on_done, threads=2, chunk_bytes=CHUNK)
    io.submit([request(file, 0, 1)])
    assert ended.wait(WATCHDOG)
    file.close()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 5), st.sampled_from([DEMAND, PREFETCH, BACKGROUND])),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("promote"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("fail"), st.integers(0, FILE_PAGES - 1), st.just(0)),
        st.tuples(st.just("hold"), st.integers(0, FILE_PAGES - 8), st.integers(1, 8)),
        st.tuples(st.just("let"), st.just(0), st.just(0)),
        st.tuples(st.just("close"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(operations=OPERATIONS, threads=st.integers(1, 3), page=st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_every_request_completes_exactly_once_whatever_happens_to_it(
    path: Path, operations: list[tuple[str, int, int]], threads: int, page: random.Random
) -> None:
    file, ledger = ScriptedFile(path), Ledger()
    io = IoScheduler(ledger, threads=threads, chunk_bytes=CHUNK)
    requests: list[ReadRequest] = []
    closing: Worker | None = None
    for name, number, other in operations:
        if name == "submit" and closing is None:
            new = request(file, page.randrange(FILE_PAGES - number), number, other, len(requests))
            requests.append(new)
            io.submit([new])
        elif name in ("cancel", "promote") and requests:
            getattr(io, name)(requests[number % len(requests)])
        elif name == "fail":
            file.fail(number * PAGE, 1)
        elif name == "hold":
            file.hold(number * PAGE, other * PAGE)
        elif name == "let":
            file.let_all()
        elif name == "close" and closing is None:
            closing = Worker(io.close)
    file.let_all()
    ledger.expect(len(requests))
    (closing or Worker(io.close)).join()
    file.close()
    assert sorted(tag for tag, _, _ in ledger.done) == list(range(len(requests)))
    data = path.read_bytes()
    for tag, error, cancelled in ledger.done:
        done = requests[tag]
        if error is None and not cancelled:
            assert bytes(done.view) == data[done.offset : done.offset + len(done.view)]


@pytest.mark.parametrize("seed", range(3))
def test_every_request_completes_exactly_once_among_threads_that_disagree(path: Path, seed: int) -> None:
    file, ledger = ScriptedFile(path), Ledger()
    io = IoScheduler(ledger, threads=3, chunk_bytes=CHUNK)
    dice = random.Random(seed)
    for _ in range(3):
        file.fail(dice.randrange(FILE_PAGES) * PAGE, 1)
    requests = [
        request(
            file, dice.randrange(FILE_PAGES - 4), dice.randint(1, 4), dice.choice([DEMAND, PREFETCH, BACKGROUND]), tag
        )
        for tag in range(300)
    ]

    def submit() -> None:
        for start in range(0, len(requests), 5):
            io.submit(requests[start : start + 5])

    def disturb(number: int) -> None:
        own = random.Random(number)
        for _ in range(400):
            done = own.choice(requests)
            if not done._next:
                continue  # perhaps not submitted yet
            if own.random() < 0.5:
                io.promote(done)
            else:
                io.cancel(done)

    workers = [Worker(submit), Worker(disturb, 1), Worker(disturb, 2)]
    for worker in workers:
        worker.join()
    ledger.expect(len(requests))
    io.close()
    file.close()
    assert sorted(tag for tag, _, _ in ledger.done) == list(range(len(requests)))
