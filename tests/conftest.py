"""Fixtures shared by all tests."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from support.tiny_gguf import TinySpec, write_tiny

# A test does not begin with what another has learned; whoever tests that says so. Processes of tests inherit it.
os.environ["EXPERTIER_PROFILE"] = "off"

CGROUP = Path("/sys/fs/cgroup/memory")
_numbers = itertools.count()

settings.register_profile("suite", deadline=None)  # a busy machine fails no test
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[TinySpec], Path]]:
    """Yield a function that writes a small model once per session and returns the file to load."""
    directory = tmp_path_factory.mktemp("tiny")
    written: dict[TinySpec, Path] = {}

    def model(spec: TinySpec) -> Path:
        if spec not in written:
            written[spec] = write_tiny(directory / f"tiny-{len(written)}.gguf", spec)
        return written[spec]

    yield model
    shutil.rmtree(directory)  # pytest keeps the directories of three runs, too much for models


@pytest.fixture
def memory_group() -> Iterator[Callable[[int], Path]]:
    """Yield a function that makes a control group with a memory limit in bytes, page cache included."""
    with ExitStack() as stack:

        def make(limit: int) -> Path:
            group = CGROUP / f"expertier-test-{os.getpid()}-{next(_numbers)}"
            try:
                group.mkdir()
                stack.callback(group.rmdir)
                (group / "memory.limit_in_bytes").write_text(str(limit))
            except OSError as error:
                pytest.skip(f"no control group of version 1 can be made: {error}")
            return group

        yield make
