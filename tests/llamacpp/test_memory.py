"""Memory is what was promised: loading leaves the experts alone, running stays within the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expertier.catalog.gguf import read_gguf
from llamacpp.engines import sizes
from support.tiny_gguf import TinySpec, write_tiny

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20

MEASURE = """
    import ctypes, json, mmap, os, sys
    from pathlib import Path

    model, options, group = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))

    import llama_cpp, numpy
    from expertier_llamacpp import Llama

    def status():
        values = {}
        for line in open("/proc/self/status"):
            if line.startswith(("VmRSS", "VmHWM", "RssAnon", "RssFile")):
                key, value = line.split(":")
                values[key] = int(value.split()[0]) << 10
        return values

    def io():
        return {key: int(value) for key, value in (line.split(":") for line in open("/proc/self/io"))}

    libc = ctypes.CDLL(None, use_errno=True)

    def cached_pages():
        # Which pages of the file the page cache holds, asked through a mapping that is not touched.
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
            size = len(mapping)
            vector = (ctypes.c_ubyte * -(-size // 4096))()
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) == 0
            pages = numpy.frombuffer(vector, numpy.uint8) & 1
            return pages.copy()

    fd = os.open(model, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    settings = dict(n_ctx=256, n_batch=64, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False)
    before, read_before = status(), io()
    llm = Llama(str(model), **settings, **options)
    after, read_after = status(), io()
    cached = 0
    if not group:
        pages = cached_pages()
        for layer in llm.catalog.layers:
            for part in layer.parts:
                end = part.offset + (layer.experts - 1) * part.stride + part.expert_bytes
                cached += int(pages[-(-part.offset // 4096) : end // 4096].sum()) * 4096
    resident_at_load = llm.offload.stats().resident_bytes
    prompt = numpy.random.default_rng(3).integers(0, 256, 60).tolist()
    largest = 0
    for number, token in enumerate(llm.generate(prompt, temp=0.9)):
        largest = max(largest, status()["VmRSS"])
        if number == 40:
            break
    stats = llm.offload.stats()
    print(json.dumps({
        "load_hwm": after["VmHWM"] - before["VmHWM"], "load_rss": after["VmRSS"] - before["VmRSS"],
        "load_rchar": read_after["rchar"] - read_before["rchar"],
        "load_read": read_after["read_bytes"] - read_before["read_bytes"], "cached": cached,
        "resident_at_load": resident_at_load, "rss": largest - before["VmRSS"],
        "budget": stats.budget_bytes, "peak": stats.peak_resident_bytes, "evictions": stats.evictions,
        "anon": status()["RssAnon"] - before["RssAnon"], "resident": stats.resident_bytes,
    }))
    llm.close()
    print(json.dumps({"closed": status()["VmRSS"] - before["VmRSS"]}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write a model of about 150 MB, nearly all of it experts of about 400 KB."""
    directory = tmp_path_factory.mktemp("memory")
    path = write_tiny(directory / "big.gguf", TinySpec(layers=4, experts=96, top_k=4, hidden=256, feed_forward=512))
    with path.open("rb") as file:
        os.fsync(file.fileno())  # dirty pages cannot be dropped
    yield path
    path.unlink()


def measure(path: Path, group: Path | None = None, **options: Any) -> dict[str, Any]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("plugin", "adapters", "tests"))
    options = {f"expert_{name}": value for name, value in {"repack": "off", **options}.items()}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(path), json.dumps(options), str(group or "")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    used: dict[str, Any] = {}
    for line in result.stdout.splitlines():
        used |= json.loads(line)
    return used


def _other_bytes(path: Path) -> int:
    catalog = read_gguf(path)
    return path.stat().st_size - catalog.total_expert_bytes


@pytest.mark.parametrize("io_mode", ["direct", "buffered"])
def test_loading_neither_reads_nor_caches_the_experts_and_running_keeps_to_the_budget(big: Path, io_mode: str) -> None:
    total = sizes(big).total
    assert total > 140 * MB
    used = measure(big, budget="25%", io_mode=io_mode)
    other = _other_bytes(big)
    assert used["resident_at_load"] == 0
    assert used["load_rchar"] < 2 * other + 8 * MB
    assert used["load_read"] < 3 * other + 24 * MB  # the kernel reads ahead of what is asked for
    assert used["load_hwm"] < 2 * other + 60 * MB
    assert used["cached"] < 8 * MB
    assert used["evictions"] > 0
    assert used["peak"] <= used["budget"] <= total // 4
    assert used["rss"] < used["budget"] + other + 60 * MB
    assert used["anon"] > used["resident"]  # that the measure sees the experts at all
    assert used["closed"] < other + 60 * MB


def test_a_smaller_budget_takes_less_memory_under_another_policy_too(big: Path) -> None:
    used = measure(big, budget="15%", lookahead="off", policy="lru")
    assert used["rss"] < used["budget"] + _other_bytes(big) + 60 * MB


@pytest.fixture
def limited(memory_group: Callable[[int], Path]) -> Path:
    return memory_group(160 * MB)


@pytest.mark.root
def test_budget_auto_finishes_within_a_control_group_that_counts_every_page(big: Path, limited: Path) -> None:
    used = measure(big, limited, budget="auto")
    limit = int((limited / "memory.limit_in_bytes").read_text())
    assert int((limited / "memory.max_usage_in_bytes").read_text()) <= limit
    assert "oom_kill 0" in (limited / "memory.oom_control").read_text()
    assert int((limited / "memory.failcnt").read_text()) == 0
    assert used["peak"] < sizes(big).total, "the limit did not bind"
    assert used["evictions"] > 0
