"""The sidecar file gives back what was put into it, or says what is wrong; and it is written once, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.catalog import pack as pack_module
from expertier.catalog.pack import Pack, PackKey, build_pack, checksum, find_or_build, read_pack
from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.errors import SidecarError
from expertier.storage import IoScheduler, ReadRequest, StorageFile

KEY = PackKey(model="aa", content="bb", layout="cc", library="engine 1")
NAME = f"m.{KEY.short}.expertier"


def model_layer(layer: int, sizes: Sequence[int], experts: int) -> LayerExperts:
    roles = ("gate", "up", "down")
    return LayerExperts(
        layer=layer,
        experts=experts,
        top_k=1,
        parts=tuple(
            ExpertPart(
                name=f"blk.{layer}.ffn_{role}_exps.weight",
                layer=layer,
                role=role,  # type: ignore[arg-type]
                file=Path("m.gguf"),
                offset=1000 * index,
                expert_bytes=size,
                experts=experts,
                type_name="Q4_K",
                shape=(size, 1, experts),
            )
            for index, (role, size) in enumerate(zip(roles, sizes, strict=False))
        ),
    )


LAYERS = (model_layer(0, (5000, 300, 4096), 3), model_layer(2, (8192,), 5))
PARTS = tuple(part for layer in LAYERS for part in layer.parts)


def contents(part: ExpertPart, expert: int) -> bytes:
    return random.Random(f"{part.name} {expert}").randbytes(part.expert_bytes)


def produce(parts: Sequence[ExpertPart] = PARTS) -> Generator[memoryview, None, None]:
    for part in parts:
        for expert in range(part.experts):
            yield memoryview(contents(part, expert))


@contextlib.contextmanager
def silent(_path: Path, _size: int) -> Iterator[Any]:
    yield lambda _count: None


def build(path: Path, **changes: Any) -> Pack:
    given: dict[str, Any] = {"key": KEY, "parts": PARTS, "produce": produce, "announce": silent}
    return build_pack(path, **{**given, **changes})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / NAME


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("pack") / NAME
    build(path)
    return path.read_bytes()


def data_start(raw: bytes) -> int:
    return int.from_bytes(raw[24:32], "little")


# ---- what goes in comes out


@given(
    sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=3),
    layers=st.integers(1, 3),
    experts=st.integers(1, 5),
)
@settings(max_examples=25, deadline=None)
def test_every_expert_comes_back_page_aligned_with_a_checksum_that_fits(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], layers: int, experts: int
) -> None:
    directory = tmp_path_factory.mktemp("pack")
    model = tuple(model_layer(layer, sizes, experts) for layer in range(layers))
    parts = [part for layer in model for part in layer.parts]
    packed = build(directory / NAME, parts=parts, produce=lambda: produce(parts))
    raw = (directory / NAME).read_bytes()
    assert names(directory) == [NAME]
    found = packed.layers(model)
    assert [layer.layer for layer in found] == list(range(layers))
    ends = [data_start(raw)]
    for part in (part for layer in found for part in layer.parts):
        assert part.file == directory / NAME
        assert part.offset % 4096 == part.stride % 4096 == 0
        assert part.offset == ends[-1]
        for expert in range(experts):
            start = part.offset + expert * part.stride
            data = raw[start : start + part.expert_bytes]
            assert data == contents(part, expert)
            check = packed.check(part.name, expert)
            assert check is not None
            check(memoryview(data))
        ends.append(part.offset + experts * part.stride)
    assert ends[-1] == len(raw)


def test_parts_that_are_not_in_the_pack_stay_where_they_are(path: Path) -> None:
    packed = build(path, parts=PARTS[:1], produce=lambda: produce(PARTS[:1]))
    found = packed.layers(LAYERS)
    assert found[0].parts[0].file == path
    assert found[0].parts[1:] == LAYERS[0].parts[1:]
    assert found[1] == LAYERS[1]
    assert packed.check(LAYERS[1].parts[0].name, 0) is None


def test_an_expert_is_checked_until_it_was_right_once(path: Path) -> None:
    packed = build(path)
    name = PARTS[0].name
    check = packed.check(name, 1)
    assert check is not None
    with pytest.raises(SidecarError, match=r"damaged: expert 1 of blk\.0\.ffn_gate_exps\.weight"):
        check(memoryview(contents(PARTS[0], 2)))
    again = packed.check(name, 1)
    assert again is not None
    again(memoryview(contents(PARTS[0], 1)))
    assert packed.check(name, 1) is None
    assert packed.check(name, 2) is not None


@pytest.mark.parametrize(
    "changed",
    [
        (replace(LAYERS[0], parts=LAYERS[0].parts[:2]), LAYERS[1]),
        (LAYERS[0], replace(LAYERS[1], parts=(replace(LAYERS[1].parts[0], type_name="Q4_0"),))),
        (LAYERS[0], replace(LAYERS[1], parts=(replace(LAYERS[1].parts[0], shape=(4096, 2, 5)),))),
    ],
)
def test_a_pack_that_does_not_fit_the_model_is_refused(path: Path, changed: tuple[LayerExperts, ...]) -> None:
    with pytest.raises(SidecarError, match=r"does not have|another shape or type"):
        build(path).layers(changed)


# ---- damage


@given(position=st.integers(0), change=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_of_the_header_is_noticed_when_opening(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, position: int, change: int
) -> None:
    raw = bytearray(good)
    raw[position % data_start(good)] ^= change
    path = tmp_path_factory.mktemp("pack") / NAME
    path.write_bytes(raw)
    with pytest.raises(SidecarError):
        read_pack(path, KEY)


@given(part=st.sampled_from(PARTS), expert=st.integers(0, 2), position=st.integers(0), change=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_of_an_expert_is_noticed_when_it_is_checked_and_harms_no_other(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, part: ExpertPart, expert: int, position: int, change: int
) -> None:
    path = tmp_path_factory.mktemp("pack") / NAME
    path.write_bytes(good)
    packed = read_pack(path, KEY)
    raw = bytearray(good)
    raw[packed.parts[part.name].offset + expert * packed.parts[part.name].stride + position % part.expert_bytes] ^= (
        change
    )
    for other in packed.parts.values():
        for index in range(other.experts):
            check = packed.check(other.name, index)
            assert check is not None
            start = other.offset + index * other.stride
            data = memoryview(raw)[start : start + other.expert_bytes]
            if (other.name, index) == (part.name, expert):
                with pytest.raises(SidecarError, match="Delete it"):
                    check(data)
            else:
                check(data)


@given(size=st.integers(0))
@settings(max_examples=60, deadline=None)
def test_a_truncated_file_is_noticed(tmp_path_factory: pytest.TempPathFactory, good: bytes, size: int) -> None:
    path = tmp_path_factory.mktemp("pack") / NAME
    path.write_bytes(good[: size % len(good)])
    with pytest.raises(SidecarError):
        read_pack(path, KEY)


@pytest.mark.parametrize("raw", [b"", b"GGUF" + bytes(100), b"EXPTPACK" + b"\xff" * 100, b"\0" * 9000])
def test_what_is_no_pack_is_refused(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with pytest.raises(SidecarError):
        read_pack(path, KEY)


def test_a_longer_file_is_noticed(path: Path, good: bytes) -> None:
    path.write_bytes(good + b"\0")
    with pytest.raises(SidecarError, match="damaged"):
        read_pack(path, KEY)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(SidecarError, match="cannot be read"):
        read_pack(path, KEY)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("model", "another model"),
        ("content", "another model"),
        ("library", r"written with engine 1, this is other"),
        ("layout", "another kind of CPU"),
    ],
)
def test_a_pack_made_for_something_else_is_refused_by_name(path: Path, good: bytes, field: str, words: str) -> None:
    path.write_bytes(good)
    other = replace(KEY, **{field: "other"})
    assert other.short != KEY.short
    with pytest.raises(SidecarError, match=words):
        read_pack(path, other)


# ---- the checksum


@given(data=st.binary(max_size=9000), position=st.integers(0), change=st.integers(1, 255))
@settings(deadline=None)
def test_the_checksum_sees_every_changed_byte(data: bytes, position: int, change: int) -> None:
    assert checksum(data) == checksum(memoryview(bytearray(data))) < 2**32
    changed = bytearray(data)
    if changed:
        changed[position % len(changed)] ^= change
        assert checksum(changed) != checksum(data)


@pytest.mark.parametrize("size", [40_960, 41_003])
def test_the_checksum_sees_moved_and_lost_data(size: int) -> None:
    data = random.Random(1).randbytes(size)
    variants = [
        data[4096:8192] + data[:4096] + data[8192:],  # two sectors change places
        data[8:16] + data[:8] + data[16:],  # two words of a sector
        data[:512] + bytes(512) + data[1024:],
        data[:8192] + data[:4096] + data[12288:],  # a sector of another place
        data[::-1],
        data + b"\0",
        data[:-1],
    ]
    assert len({checksum(variant) for variant in [data, *variants]}) == len(variants) + 1


# ---- failing leaves nothing behind


def failing(error: BaseException) -> Any:
    def start() -> Generator[memoryview, None, None]:
        for count, data in enumerate(produce()):
            if count == 4:
                raise error
            yield data

    return start


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SidecarError("no")])
def test_a_failed_or_interrupted_build_leaves_nothing(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        build(path, produce=failing(error))
    assert names(path.parent) == []


@pytest.mark.parametrize("parts", [PARTS[:-1], PARTS[::-1]])
def test_a_producer_of_the_wrong_experts_is_noticed(path: Path, parts: Sequence[ExpertPart]) -> None:
    with pytest.raises(ValueError, match="bytes per expert"):
        build(path, produce=lambda: produce(parts))
    assert names(path.parent) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_writing_is_named_with_the_way_out(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write = os.write
    calls = []

    def full(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) > 5:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SidecarError, match=r"needs .* bytes\).* bytes\) are free.*EXPERTIER_SIDECAR_DIR.*repack='off'"):
        build(path)
    monkeypatch.undo()
    assert names(path.parent) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=4096))
    with pytest.raises(SidecarError, match=r"12288 bytes\) are free"):
        build(path, produce=lambda: pytest.fail("begun"))
    assert names(path.parent) == []


@pytest.mark.root
def test_a_really_full_disk_is_named_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small filesystem")
    try:
        with pytest.raises(SidecarError, match="are free there"):
            build(tmp_path / NAME)
        monkeypatch.setattr(pack_module, "_free", lambda _: 2**40)
        with pytest.raises(SidecarError, match="are free there"):
            build(tmp_path / NAME)
        assert names(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---- where


def find(directories: Sequence[Path], **changes: Any) -> Pack:
    given: dict[str, Any] = {"key": KEY, "parts": PARTS, "produce": produce, "announce": silent}
    return find_or_build(directories, NAME, **{**given, **changes})


def test_a_pack_is_found_wherever_it_is_and_not_built_again(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    second.mkdir()
    build(second / NAME)
    assert find([first, second], produce=lambda: pytest.fail("built again")).path == second / NAME
    assert not first.exists()


def test_the_next_directory_is_used_when_the_first_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, file = tmp_path / "read-only", tmp_path / "b" / "c", tmp_path / "file"
    first.mkdir()
    file.touch()
    open_file = os.open

    def guarded(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT and Path(path).is_relative_to(first):  # as root, permissions would not stop us
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, flags, *rest)

    monkeypatch.setattr(os, "open", guarded)
    nowhere = tmp_path / ("x" * 300)  # the system refuses even to look
    assert find([first, file, nowhere, second]).path == second / NAME
    assert names(first) == []
    assert names(second) == [NAME]


def test_without_any_directory_to_write_to_the_error_says_so(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SidecarError, match=r"cannot be written to .*file.*EXPERTIER_SIDECAR_DIR"):
        find([file])


@pytest.mark.parametrize("damage", ["header", "size", "key", "foreign"])
def test_a_bad_pack_at_the_expected_place_is_reported_and_built_again(
    path: Path, good: bytes, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if damage == "key":
        build(path, key=replace(KEY, layout="other"))
    else:
        raw = {"header": good[:100] + b"?" + good[101:], "size": good[:-1], "foreign": b"something else"}[damage]
        path.write_bytes(raw)
    with caplog.at_level(logging.WARNING, "expertier"):
        assert find([path.parent]).key == KEY
    assert str(path) in caplog.text
    assert path.read_bytes() == good


def test_a_full_disk_is_not_dodged_by_writing_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096))
    with pytest.raises(SidecarError, match="are free there"):
        find([tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "b").exists()


# ---- several processes

BUILDER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    sys.path[:0] = sys.argv[1].split(":")
    from core.test_pack import KEY, build, produce
    path, pause = Path(sys.argv[2]), float(sys.argv[3])

    def slow():
        print("building", flush=True)
        for count, data in enumerate(produce()):
            if count == 6:
                print("half", flush=True)
                time.sleep(pause)
            yield data

    build(path, produce=slow)
    print("done", flush=True)
    """
)


def builder(path: Path, pause: float) -> subprocess.Popen[str]:
    roots = ":".join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, roots, str(path), str(pause)], stdout=subprocess.PIPE, text=True
    )


def test_processes_that_want_the_same_file_write_it_once(path: Path, good: bytes) -> None:
    processes = [builder(path, 1.0) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(output.count("building") for output in outputs) == 1
    assert all(output.endswith("done\n") for output in outputs)
    assert path.read_bytes() == good
    assert names(path.parent) == [NAME]


def test_what_a_killed_writer_left_is_removed_by_the_next(path: Path, good: bytes) -> None:
    process = builder(path, 60.0)
    assert process.stdout is not None
    while "half" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert path.with_name(NAME + ".part") in path.parent.iterdir()
    assert not path.exists()
    build(path)
    assert path.read_bytes() == good
    assert names(path.parent) == [NAME]


def test_leftovers_of_other_sidecars_of_the_model_go_unless_somebody_writes_them(path: Path) -> None:
    dead, busy, stranger = (path.with_name(f"{name}.expertier.part") for name in ("m.11", "m.22", "m.x.33"))
    for leftover in (dead, busy, stranger):
        leftover.write_bytes(b"half")
    lock = busy.with_suffix(".lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        build(path)
    assert names(path.parent) == sorted([NAME, busy.name, lock.name, stranger.name])


def test_whoever_waited_for_a_writer_that_failed_writes_itself(path: Path, good: bytes) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def broken() -> Generator[memoryview, None, None]:
        begun.set()
        assert go_on.wait(60)
        raise RuntimeError("no")
        yield

    def first() -> None:
        with contextlib.suppress(RuntimeError):
            build(path, produce=broken)

    failing_writer, waiting = threading.Thread(target=first), threading.Thread(target=build, args=(path,))
    failing_writer.start()
    assert begun.wait(60)
    waiting.start()
    go_on.set()
    failing_writer.join(60)
    waiting.join(60)
    assert path.read_bytes() == good
    assert names(path.parent) == [NAME]


# ---- reads that carry a check


def test_a_check_sees_all_bytes_after_the_last_chunk_and_its_error_is_the_error_of_the_read(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 100)
    seen: list[bytes] = []
    results: list[tuple[Any, BaseException | None]] = []
    done = threading.Semaphore(0)

    def on_done(request: ReadRequest, error: BaseException | None, _cancelled: bool) -> None:
        results.append((request.tag, error))
        done.release()

    def reject(data: memoryview) -> None:
        seen.append(bytes(data))
        raise SidecarError("wrong")

    file = StorageFile(path, "buffered")
    scheduler = IoScheduler(on_done, threads=2, chunk_bytes=4096)
    try:
        scheduler.submit(
            [
                ReadRequest(
                    file=file, offset=0, view=memoryview(bytearray(28672)), needed=25_600, tag="bad", check=reject
                ),
                ReadRequest(
                    file=file,
                    offset=4096,
                    view=memoryview(bytearray(8192)),
                    needed=8000,
                    tag="good",
                    check=lambda data: seen.append(bytes(data)),
                ),
                ReadRequest(
                    file=file,
                    offset=1 << 20,
                    view=memoryview(bytearray(4096)),
                    needed=4096,
                    tag="unread",
                    check=lambda _: pytest.fail("checked what never arrived"),
                ),
            ]
        )
        for _ in range(3):
            assert done.acquire(timeout=60)
    finally:
        scheduler.close()
        file.close()
    errors = dict(results)
    assert isinstance(errors["bad"], SidecarError)
    assert errors["good"] is None
    assert "ended at" in str(errors["unread"])
    assert sorted(seen, key=len) == [path.read_bytes()[4096:12096], path.read_bytes()]
