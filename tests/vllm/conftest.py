"""Settings and checkpoints of the vLLM tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.tiny_hf import HfSpec, write_hf

# Before libgomp is loaded: waiting threads that spin take seconds from each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[HfSpec], Path]]:
    """Yield a function that writes a checkpoint once per module and returns its directory."""
    directory = tmp_path_factory.mktemp("checkpoints")
    written: dict[HfSpec, Path] = {}

    def write(spec: HfSpec) -> Path:
        if spec not in written:
            written[spec] = write_hf(directory / f"tiny-{len(written)}", spec)
        return written[spec]

    yield write
    shutil.rmtree(directory)
