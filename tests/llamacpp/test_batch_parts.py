"""The parts of the batch engine that need no model: texts that grow by tokens, and cells of the KV memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import llama_cpp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertier_llamacpp.batch.room import KvRoom
from expertier_llamacpp.batch.text import TextStream

pytestmark = pytest.mark.engine

CELLS, SLOTS = 24, 4


class Table:
    """Pieces of text by token, as a vocabulary has them."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def of(self, token: int, before: Any = ()) -> bytes:
        return self._pieces[token]


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A text, and its bytes cut anywhere, in the middle of characters too."""
    text = draw(st.text(alphabet="abcäß€😀 ", max_size=20))
    data = text.encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=8)) | {0, len(data)})
    return text, [data[start:stop] for start, stop in itertools.pairwise(cuts)]


@given(split_texts())
def test_a_text_that_comes_in_pieces_is_the_whole_text(split: tuple[str, list[bytes]]) -> None:
    text, pieces = split
    stream: Any = TextStream(Table(pieces), [])  # type: ignore[arg-type]
    told = [stream.add(token, ())[0] for token in range(len(pieces))]
    assert "".join(told) + stream.end() == text == stream.text


@given(split_texts(), st.lists(st.text(alphabet="abcäß€😀 ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_ends_before_the_first_stop_text_however_the_tokens_cut_it(
    split: tuple[str, list[bytes]], stops: list[str]
) -> None:
    text, pieces = split
    stream: Any = TextStream(Table(pieces), stops)  # type: ignore[arg-type]
    told = ""
    for token in range(len(pieces)):
        piece, stopped = stream.add(token, ())
        told += piece
        so_far = b"".join(pieces[: token + 1]).decode(errors="ignore")
        places = [place for stop in stops if (place := so_far.find(stop)) >= 0]
        assert stopped == bool(places)
        assert so_far.startswith(told)
        if stopped:  # several may have become complete with one token: the text ends before the first of them
            assert told == so_far[: min(places)]
            return
    assert told + stream.end() == text


def test_bytes_that_are_no_characters_are_left_out_as_llama_cpp_python_does() -> None:
    pieces = [b"a", b"\xff", b"b\xe2", b"\x82", b"\xac", b"\xe2"]
    stream: Any = TextStream(Table(pieces), [])  # type: ignore[arg-type]
    told = "".join(stream.add(token, ())[0] for token in range(len(pieces))) + stream.end()
    assert told == b"".join(pieces).decode(errors="ignore") == "ab€"


class Memory:
    """What llama.cpp's unified KV memory holds: for every cell the sequences and the position it belongs to."""

    def __init__(self) -> None:
        self.cells: dict[tuple[int, int], int] = {}  # (sequence, position) -> cell
        self._next = 0

    def fill(self, sequence: int, start: int, count: int) -> None:
        for position in range(start, start + count):
            self.cells[sequence, position] = self._next
            self._next += 1

    def remove(self, sequence: int, start: int, stop: int) -> bool:
        self.cells = {key: cell for key, cell in self.cells.items() if key[0] != sequence or key[1] < max(start, 0)}
        return True

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        for (sequence, position), cell in list(self.cells.items()):
            if sequence == source and start <= position < stop:
                self.cells[target, position] = cell

    def used(self) -> int:
        return len(set(self.cells.values()))


class Rooms(RuleBasedStateMachine):
    """Requests come, grow, are cut and go, as the engine does it."""

    @initialize()
    def make(self) -> None:
        self.memory = Memory()
        self.patches = [
            ("llama_memory_seq_rm", lambda memory, *where: memory.remove(*where)),
            ("llama_memory_seq_cp", lambda memory, *where: memory.copy(*where)),
        ]
        self.stock = {name: getattr(llama_cpp, name) for name, _ in self.patches}
        for name, patch in self.patches:
            setattr(llama_cpp, name, patch)
        self.room = KvRoom(self.memory, cells=CELLS, slots=SLOTS, sharing=True)
        self.taken: dict[int, list[int]] = {}

    def teardown(self) -> None:
        for name, stock in getattr(self, "stock", {}).items():
            setattr(llama_cpp, name, stock)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def take(self, tokens: list[int]) -> None:
        found = self.room.take(tokens)
        assert (found is None) == (len(self.taken) == SLOTS)
        if found is not None:
            slot, length = found
            assert slot not in self.taken
            assert 0 <= length < len(tokens)
            assert self.room.held[slot] == tokens[:length]
            self.taken[slot] = tokens

    @precondition(lambda self: getattr(self, "taken", None))
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.taken)))
        tokens = data.draw(st.lists(st.integers(0, 1), max_size=5))[: self.room.free]
        before = len(self.room.held[slot])
        self.memory.fill(slot, before, len(tokens))
        self.room.grow(slot, tokens)
        assert self.room.held[slot][before:] == tokens

    @precondition(lambda self: getattr(self, "taken", None))
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.taken)))
        length = data.draw(st.integers(0, len(self.room.held[slot])))
        assert self.room.cut(slot, length) == length

    @precondition(lambda self: len(getattr(self, "taken", ())) > 1)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        source, slot = data.draw(st.permutations(sorted(self.taken)))[:2]
        length = data.draw(st.integers(0, len(self.room.held[source])))
        self.room.share(source, slot, length)
        assert self.room.held[slot] == self.room.held[source][:length]

    @precondition(lambda self: getattr(self, "taken", None))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.taken)))
        del self.taken[slot]
        self.room.leave(slot)

    @rule()
    def reclaim(self) -> None:
        idle = any(held for slot, held in enumerate(self.room.held) if slot not in getattr(self, "taken", {}))
        assert self.room.reclaim() == idle

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "room"):
            return
        assert self.room.free == CELLS - self.memory.used()
        mine = {cell for (slot, _), cell in self.memory.cells.items() if slot in self.taken}
        assert self.room.available() == CELLS - len(mine)
        for slot, held in enumerate(self.room.held):
            positions = sorted(position for sequence, position in self.memory.cells if sequence == slot)
            assert positions == list(range(len(held)))


TestRooms = pytest.mark.engine(Rooms.TestCase)


@pytest.fixture(autouse=True)
def _memory_calls_are_put_back() -> Iterator[None]:
    stock = (llama_cpp.llama_memory_seq_rm, llama_cpp.llama_memory_seq_cp)
    yield
    assert (llama_cpp.llama_memory_seq_rm, llama_cpp.llama_memory_seq_cp) == stock
