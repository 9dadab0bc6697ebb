"""Recorded routes come back as they were, and nothing that is damaged, foreign or too new is believed."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.errors import (
    TraceChecksumError,
    TraceError,
    TraceFormatError,
    TraceMismatchError,
    TraceTooShortError,
    TraceTruncatedError,
    TraceVersionError,
)
from expertier.routing.recorder import TraceRecorder
from expertier.routing.trace import Trace, TraceHeader, TraceLayer, read_trace
from expertier.routing.trace_format import COUNTS, FRAME, MAGIC, STEP, frame
from support.traces import header, skewed_routes, write_trace


@st.composite
def recordings(draw: st.DrawFn) -> tuple[TraceHeader, list[dict[str, Any]]]:
    """A model whose layers differ, and steps of all kinds through it."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 4)), min_size=1, max_size=4))
    layers = tuple(
        TraceLayer(
            layer=3 * place + 1,
            experts=experts,
            top_k=min(top_k, experts),
            slot_bytes=draw(st.integers(1, 1 << 40)),
            read_bytes=(draw(st.integers(0, 1 << 40)),) * draw(st.sampled_from([1, experts])),
        )
        for place, (experts, top_k) in enumerate(sizes)
    )
    shape = TraceHeader(
        fingerprint=draw(st.text(max_size=8)),
        architecture="any",
        layers=layers,
        weights=draw(st.booleans()),
        tokens=draw(st.booleans()),
        hidden_size=draw(st.sampled_from([0, 3])),
    )
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    steps = []
    for _ in range(draw(st.integers(0, 6))):
        tokens = draw(st.integers(1, 5))
        calls = []
        for layer in layers:
            if draw(st.integers(0, 4)):  # now and then a layer's routes are not seen
                rows = draw(st.integers(0, tokens))
                routes = random.integers(0, layer.experts, (rows, layer.top_k))
                weights = random.random(routes.shape) if draw(st.booleans()) else None
                hidden = random.random((1, 3)) if shape.hidden_size and rows and draw(st.booleans()) else None
                calls.append((layer.layer, routes, weights, hidden))
        steps.append(
            {
                "phase": draw(st.sampled_from(["decode", "prefill"])),
                "requests": random.integers(0, 1 << 31, tokens),
                "positions": random.integers(-1, 1 << 30, tokens),
                "token_ids": random.integers(0, 1 << 20, tokens),
                "calls": calls,
            }
        )
    return shape, steps


def record(path: Path, shape: TraceHeader, steps: list[dict[str, Any]], *, close: bool = True) -> TraceRecorder:
    recorder = TraceRecorder(path, shape)
    for step in steps:
        recorder.begin_step(
            step["phase"], requests=step["requests"], positions=step["positions"], token_ids=step["token_ids"]
        )
        for call in step["calls"]:
            recorder.record(*call)
        recorder.end_step()
    if close:
        recorder.close()
    return recorder


def check_equal(trace: Trace, shape: TraceHeader, steps: list[dict[str, Any]]) -> None:
    assert trace.header == shape
    kept = [step for step in steps if step["calls"]]
    found = list(trace.steps())
    assert len(found) == len(kept)
    for step, original in zip(found, kept, strict=True):
        assert step.phase == original["phase"]
        assert np.array_equal(step.requests, original["requests"])
        assert np.array_equal(step.positions, original["positions"])
        assert (step.token_ids is not None) == shape.tokens
        if step.token_ids is not None:
            assert np.array_equal(step.token_ids, original["token_ids"])
        assert list(step.routes) == [call[0] for call in original["calls"]]
        for layer, routes, weights, _ in original["calls"]:
            assert np.array_equal(step.routes[layer], routes)
            if shape.weights:
                expected = np.full(routes.shape, np.nan) if weights is None else weights
                assert np.array_equal(step.weights[layer], np.float16(expected), equal_nan=True)
    assert (trace.counts.steps, trace.counts.tokens) == (len(kept), sum(step.tokens for step in found))


@settings(max_examples=60, deadline=None)
@given(recordings())
def test_what_was_recorded_is_what_is_read(recording: tuple[TraceHeader, list[dict[str, Any]]]) -> None:
    shape, steps = recording
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace"
        record(path, shape, steps)
        trace = read_trace(path)
        check_equal(trace, shape, steps)
        assert trace.complete
        hidden = [call[3] for step in steps for call in step["calls"] if call[3] is not None]
        read = [row for block in trace.blocks() for row in block.hidden]
        assert np.array_equal(np.array(read), np.float16(hidden).reshape(len(hidden), -1) if hidden else np.array([]))


@settings(max_examples=25, deadline=None)
@given(recordings(), st.data())
def test_a_recorder_that_was_killed_leaves_a_readable_prefix_that_can_be_continued(
    recording: tuple[TraceHeader, list[dict[str, Any]]], data: st.DataObject
) -> None:
    shape, steps = recording
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace"
        borders = [0]
        with TraceRecorder(path, shape) as recorder:
            recorder.flush()
            start = path.stat().st_size
            for step in steps:
                recorder.begin_step(**{key: value for key, value in step.items() if key != "calls"})
                for call in step["calls"]:
                    recorder.record(*call)
                recorder.end_step()
                recorder.flush()
                borders.append(path.stat().st_size - start)
        cut = data.draw(st.integers(0, borders[-1]))
        path.write_bytes(path.read_bytes()[: start + cut])
        whole = sum(border <= cut for border in borders[1:])
        check_equal(read_trace(path, partial=True), shape, steps[:whole])
        with pytest.raises(TraceTruncatedError, match="--partial"):
            list(read_trace(path).blocks())
        record(path, shape, steps[whole:])
        check_equal(read_trace(path), shape, steps)


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    shape = header(2, 4, 1)
    write_trace(path, shape, skewed_routes(shape, 5))
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        with pytest.raises(TraceError):
            list(read_trace(path).blocks())


def test_a_missing_block_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    shape = header(2, 4, 1)
    routes = skewed_routes(shape, 2)
    with TraceRecorder(path, shape) as recorder:
        sizes = [path.stat().st_size]
        for token in routes:
            recorder.begin_step("decode", requests=0, positions=[0])
            recorder.record(0, token[:1])
            recorder.end_step()
            recorder.flush()
            sizes.append(path.stat().st_size)
    good = path.read_bytes()
    path.write_bytes(good[: sizes[0]] + good[sizes[1] :])
    with pytest.raises(TraceChecksumError, match="missing or in another order"):
        list(read_trace(path).blocks())


def test_a_newer_trace_is_refused_by_its_version(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(MAGIC + struct.pack("<II", 2, 10) + b"whatever that is")
    with pytest.raises(TraceVersionError, match=r"version 2.*newer Expertier"):
        read_trace(path)


@pytest.mark.parametrize("content", [b"", b"EXP", b"GGUF" * 10])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(TraceError):
        read_trace(path)
    with pytest.raises(TraceFormatError, match="No such file"):
        read_trace(tmp_path / "nothing")


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    shape = header()
    write_trace(tmp_path / "trace", shape, skewed_routes(shape, 2))
    with pytest.raises(TraceMismatchError, match="expertier profile"):
        read_trace(tmp_path / "trace", fingerprint="another")
    with pytest.raises(TraceMismatchError, match="of another model"):
        TraceRecorder(tmp_path / "trace", replace(shape, fingerprint="another"))
    with pytest.raises(TraceMismatchError, match="with other contents"):
        TraceRecorder(tmp_path / "trace", replace(shape, weights=True))
    assert read_trace(tmp_path / "trace", fingerprint=shape.fingerprint, least_tokens=2).counts.tokens == 2


def test_a_trace_with_a_single_token_is_refused_where_more_are_needed(tmp_path: Path) -> None:
    shape = header()
    write_trace(tmp_path / "trace", shape, skewed_routes(shape, 1))
    with pytest.raises(TraceTooShortError, match="holds a single token, 2 are needed"):
        read_trace(tmp_path / "trace", least_tokens=2)


def forged(path: Path, shape: TraceHeader, raw: bytes) -> Trace:
    """A file with valid checksums over whatever `raw` says."""
    path.write_bytes(shape.encode() + frame(STEP, raw)[0])
    return read_trace(path, partial=True)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        COUNTS.pack(1, 1, 1, 2, 0),
        COUNTS.pack(1 << 31, 1 << 31, 1 << 31, 1 << 31, 1 << 31),
        # One step of one token and one call; the routes name an expert that does not exist.
        COUNTS.pack(1, 1, 1, 2, 0) + struct.pack("<BIIiIHI", 0, 1, 0, 0, 0, 0, 1) + bytes([0, 8]),
        # A layer that does not exist.
        COUNTS.pack(1, 1, 1, 2, 0) + struct.pack("<BIIiIHI", 0, 1, 0, 0, 0, 9, 1) + bytes([0, 1]),
        # More rows than tokens.
        COUNTS.pack(1, 1, 1, 4, 0) + struct.pack("<BIIiIHI", 0, 1, 0, 0, 0, 0, 2) + bytes([0, 1, 2, 3]),
        # Something behind the last column.
        COUNTS.pack(1, 1, 1, 2, 0) + struct.pack("<BIIiIHI", 0, 1, 0, 0, 0, 0, 1) + bytes([0, 1, 2]),
    ],
)
def test_a_forged_block_is_refused_though_its_checksums_are_right(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(TraceFormatError):
        list(forged(tmp_path / "trace", header(), raw).blocks())


def test_a_block_that_unpacks_to_more_than_it_says_is_refused_without_unpacking_it(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(100 << 20), 9)
    start = FRAME.pack(STEP, zlib.crc32(bomb), len(bomb), 1000, 0)[:-4]
    path = tmp_path / "trace"
    path.write_bytes(header().encode() + start + struct.pack("<I", zlib.crc32(start)) + bomb)
    with pytest.raises(TraceFormatError, match="not as long as it says"):
        list(read_trace(path, partial=True).blocks())


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"layers": "x"},
        {"unknown": 1},
        {"hidden_size": -1},
        {"layers": [{"layer": 0, "experts": 2, "top_k": 3, "slot_bytes": 1, "read_bytes": [1]}]},
        {"layers": [{"layer": 0, "experts": 2, "top_k": 1, "slot_bytes": 0, "read_bytes": [1]}]},
        {"layers": [{"layer": 0, "experts": 4, "top_k": 1, "slot_bytes": 1, "read_bytes": [1, 2]}]},
        {"layers": [{"layer": 0, "experts": 4, "top_k": 1, "slot_bytes": 1, "read_bytes": [1.5]}]},
    ],
)
def test_a_header_that_describes_no_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    good = json.loads(header().encode()[16:-4])
    body = json.dumps({**good, **change}).encode()
    start = MAGIC + struct.pack("<II", 1, len(body)) + body
    path = tmp_path / "trace"
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)))
    with pytest.raises(TraceFormatError):
        read_trace(path)


def test_a_failed_step_leaves_nothing(tmp_path: Path) -> None:
    shape = header()
    with TraceRecorder(tmp_path / "trace", shape) as recorder:
        recorder.begin_step("decode", requests=7, positions=[0])
        recorder.record(0, np.array([[1, 2]]))
        recorder.drop_step()
        recorder.begin_step("decode", requests=8, positions=[0])
        recorder.record(0, np.array([[3, 4]]))
        recorder.end_step()
    (step,) = read_trace(tmp_path / "trace").steps()
    assert step.requests.tolist() == [8]


def test_notes_are_merged_and_requests_are_counted_over_sessions(tmp_path: Path) -> None:
    shape = header()
    for speed in (1.0, 2.0):
        with TraceRecorder(tmp_path / "trace", shape) as recorder:
            recorder.begin_step("decode", requests=recorder.next_request, positions=[0])
            recorder.record(0, np.array([[1, 2]]))
            recorder.end_step()
            recorder.note({"speed": speed, f"of {speed}": True})
    trace = read_trace(tmp_path / "trace", least_tokens=1)
    assert trace.notes == {"speed": 2.0, "of 1.0": True, "of 2.0": True}
    assert [int(step.requests[0]) for step in trace.steps()] == [0, 1]


def test_a_full_disk_is_told_to_the_engine_at_its_next_step(tmp_path: Path) -> None:
    target = tmp_path / "full"
    target.symlink_to("/dev/full")
    with pytest.raises(TraceFormatError, match="No space left"):
        TraceRecorder(target, header())
    path = tmp_path / "trace"
    recorder = TraceRecorder(path, header())
    recorder._file.close()
    recorder._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0)
    recorder.begin_step("decode", requests=0, positions=[0])
    recorder.record(0, np.array([[1, 2]]))
    recorder.end_step()
    with pytest.raises(TraceFormatError, match="No space left"):
        recorder.flush()
    with pytest.raises(TraceFormatError, match="Make room"):
        recorder.begin_step("decode", requests=0, positions=[0])
    with pytest.raises(TraceFormatError):
        recorder.close()
    recorder.close()


def test_the_table_has_a_row_per_token_and_narrow_layers_belong_to_the_last_rows(tmp_path: Path) -> None:
    shape = replace(header(2, 8, 2), weights=True)
    with TraceRecorder(tmp_path / "trace", shape) as recorder:
        recorder.begin_step("prefill", requests=0, positions=[0, 1, 2])
        recorder.record(0, np.array([[0, 1], [2, 3], [4, 5]]), np.full((3, 2), 0.5))
        recorder.record(1, np.array([[6, 7]]))
        recorder.end_step()
        recorder.flush()
        recorder.begin_step("decode", requests=0, positions=[3])
        recorder.record(1, np.array([[1, 2]]), np.array([[0.25, 0.75]]))
        recorder.end_step()
    table = read_trace(tmp_path / "trace").tokens()
    assert table.decode.tolist() == [False, False, False, True]
    assert table.routes.tolist() == [
        [[0, 1], [-1, -1]],
        [[2, 3], [-1, -1]],
        [[4, 5], [6, 7]],
        [[-1, -1], [1, 2]],
    ]
    assert table.weights is not None
    assert table.weights[2, 0].tolist() == [0.5, 0.5]
    assert np.isnan(table.weights[2, 1]).all()


def test_a_killed_process_loses_at_most_what_was_not_flushed(tmp_path: Path) -> None:
    script = """
import sys, time
import numpy as np
from pathlib import Path
from expertier.routing.recorder import TraceRecorder
from support.traces import header
recorder = TraceRecorder(Path(sys.argv[1]), header(), flush_seconds=0.01)
for token in range(1 << 30):
    recorder.begin_step("decode", requests=0, positions=[token])
    recorder.record(0, np.array([[token % 8, (token + 1) % 8]]))
    recorder.end_step()
    time.sleep(0.0005)
"""
    path = tmp_path / "trace"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], env={"PYTHONPATH": ":".join(sys.path)})
    try:
        while not path.exists() or path.stat().st_size < 2000:
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = list(read_trace(path, partial=True).steps())
    assert [int(step.positions[0]) for step in steps] == list(range(len(steps)))
    assert len(steps) > 2


def test_a_file_has_one_recorder_at_a_time(tmp_path: Path) -> None:
    with (
        TraceRecorder(tmp_path / "trace", header()),
        pytest.raises(TraceFormatError, match="is being recorded right now"),
    ):
        TraceRecorder(tmp_path / "trace", header())
