"""Reading from files: direct where possible, buffered where not, and what a damaged file is answered with."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expertier.errors import ExpertLoadError, ModelNotFoundError
from expertier.storage import PAGE, IoMode, StorageFile
from support.fake_engine import aligned

SIZE = 5 * PAGE + 1234  # ends off any alignment


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data.bin"
    file.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return file


@pytest.fixture
def direct_path(path: Path) -> Path:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the temporary directory has no O_DIRECT")
    return path


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def read(file: StorageFile, offset: int, length: int, needed: int | None = None) -> NDArray[np.uint8]:
    target = aligned(length)
    target[:] = 0
    file.read_into(memoryview(target), offset, length if needed is None else needed)
    return target


def spy_on_preadv(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Any, int], int | None] | None = None
) -> list[tuple[bool, int, int]]:
    """Record ``(direct, offset, length)`` of every read; `change` may answer in place of the kernel."""
    calls: list[tuple[bool, int, int]] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((fd >= 0 and is_direct(fd), offset, len(buffers[0])))
        answer = change(fd, buffers, offset) if change else None
        return real(fd, buffers, offset) if answer is None else answer

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_reads_bypass_the_page_cache_where_the_filesystem_allows_it(
    direct_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy_on_preadv(monkeypatch)
    file = StorageFile(direct_path)
    assert file.direct
    assert read(file, PAGE, 2 * PAGE).tobytes() == direct_path.read_bytes()[PAGE : 3 * PAGE]
    assert calls == [(True, PAGE, 2 * PAGE)]
    file.close()


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_padding_may_lie_beyond_an_unaligned_end_of_file(path: Path, mode: IoMode) -> None:
    file = StorageFile(path, mode)
    found = read(file, 4 * PAGE, 2 * PAGE, needed=SIZE - 4 * PAGE)
    assert found.tobytes()[: SIZE - 4 * PAGE] == path.read_bytes()[4 * PAGE :]
    file.close()


def test_a_filesystem_without_direct_reads_is_noticed_when_the_file_is_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse_direct(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse_direct)
    before = open_descriptors()
    file = StorageFile(path)
    assert not file.direct
    assert read(file, 0, PAGE).tobytes() == path.read_bytes()[:PAGE]
    file.close()
    with pytest.raises(ExpertLoadError, match=r"has no O_DIRECT.*io_mode='auto'"):
        StorageFile(path, "direct")
    assert open_descriptors() == before


def test_a_filesystem_without_direct_reads_is_noticed_at_the_first_read(
    direct_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int | None:
        if is_direct(fd):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return None

    calls = spy_on_preadv(monkeypatch, refuse)
    before = open_descriptors()
    file = StorageFile(direct_path)
    assert read(file, 0, PAGE).tobytes() == direct_path.read_bytes()[:PAGE]
    assert not file.direct
    read(file, PAGE, PAGE)
    assert [direct for direct, _, _ in calls] == [True, False, False]
    file.close()
    assert open_descriptors() == before, "falling back keeps no descriptor for ever"


def test_a_demanded_direct_mode_never_falls_back(direct_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int | None:
        raise OSError(errno.EINVAL, "refused")

    spy_on_preadv(monkeypatch, refuse)
    file = StorageFile(direct_path, "direct")
    with pytest.raises(ExpertLoadError, match="Invalid argument"):
        read(file, 0, PAGE)
    assert file.direct
    file.close()


def test_a_read_survives_that_another_thread_falls_back_in_the_middle_of_it(direct_path: Path) -> None:
    class FallsBackMeanwhile(StorageFile):
        """Answers like a file whose direct descriptor is withdrawn right after it was looked at."""

        looks = -1

        @property
        def _direct_fd(self) -> int:
            self.looks += self.looks >= 0
            return self.__dict__["fd"] if self.looks <= 1 else -1

        @_direct_fd.setter
        def _direct_fd(self, value: int) -> None:
            self.__dict__["fd"] = value

    file = FallsBackMeanwhile(direct_path)
    file.looks = 0
    assert read(file, 0, PAGE).tobytes() == direct_path.read_bytes()[:PAGE]
    file.close()


@pytest.mark.parametrize("mode", ["auto", "buffered"])
@pytest.mark.parametrize("most", [1, 700, PAGE])
def test_short_reads_are_continued(path: Path, mode: IoMode, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = min(real(fd, buffers, offset), most)
        buffers[0][count:] = b"\xee" * (len(buffers[0]) - count)
        return count

    calls = spy_on_preadv(monkeypatch, short)
    file = StorageFile(path, mode)
    needed = PAGE + 1000 if most > 1 else 40
    found = read(file, PAGE, 2 * PAGE, needed=needed)
    assert found.tobytes()[:needed] == path.read_bytes()[PAGE : PAGE + needed]
    assert len(calls) == -(-needed // most)
    assert not any(direct and offset % PAGE for direct, offset, _ in calls), "no direct read starts off a page"
    file.close()


def test_buffered_reads_do_not_stay_in_the_page_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, size, what: advised.append((offset, size, what)))
    file = StorageFile(path, "buffered")
    read(file, PAGE, PAGE)
    assert advised == [(0, 0, os.POSIX_FADV_RANDOM), (PAGE, PAGE, os.POSIX_FADV_DONTNEED)]
    file.close()


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_a_file_that_became_shorter_is_reported_with_place_and_remedy(path: Path, mode: IoMode) -> None:
    file = StorageFile(path, mode)
    os.truncate(path, 2 * PAGE + 10)
    with pytest.raises(ExpertLoadError) as caught:
        read(file, PAGE, 2 * PAGE)
    assert str(caught.value) == (
        f"{path} ended at {2 * PAGE + 10}, {PAGE - 10} bytes short of an expert. "
        "The file was truncated while in use: restore it and load the model again."
    )
    file.close()


def test_an_error_of_the_disk_is_reported_with_file_and_offset(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, buffers: list[memoryview], offset: int) -> int | None:
        raise OSError(errno.EIO, "broken")

    spy_on_preadv(monkeypatch, broken)
    file = StorageFile(path)
    with pytest.raises(ExpertLoadError, match=rf"Reading {path} at offset {PAGE} failed: Input/output error.*dmesg"):
        read(file, PAGE, PAGE)
    file.close()


@pytest.mark.parametrize("mode", ["auto", "direct", "buffered"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, mode: IoMode) -> None:
    with pytest.raises(ModelNotFoundError, match=r"missing\.bin: No such file"):
        StorageFile(tmp_path / "missing.bin", mode)


def test_a_closed_file_reads_nothing_and_closes_again_without_harm(path: Path) -> None:
    before = open_descriptors()
    file = StorageFile(path)
    file.close()
    file.close()
    assert open_descriptors() == before
    with pytest.raises(ExpertLoadError, match="Bad file descriptor"):
        read(file, 0, PAGE)
