"""Fixtures of the llama.cpp tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# Before libgomp is loaded: waiting threads that spin take seconds from each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

CGROUP = Path("/sys/fs/cgroup/memory")
_numbers = itertools.count()


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
