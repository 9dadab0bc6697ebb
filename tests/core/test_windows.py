"""Expert windows: where an expert lies, what backs it, and what happens to neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.manager import OffloadManager
from expertier.residency import pages
from expertier.residency.windows import WindowPool
from expertier.storage import PAGE, StorageFile

EXPERTS = 5


def layer(path: Path, index: int, offset: int, sizes: tuple[int, int]) -> LayerExperts:
    parts = []
    for role, size in zip(("gate_up", "down"), sizes, strict=True):
        parts.append(
            ExpertPart(
                name=f"{index}.{role}",
                layer=index,
                role=role,  # type: ignore[arg-type]
                file=path,
                offset=offset,
                expert_bytes=size,
                experts=EXPERTS,
                type_name="BF16",
                shape=(size // 2, 1, EXPERTS),
            )
        )
        offset += size * EXPERTS
    return LayerExperts(layer=index, experts=EXPERTS, top_k=2, parts=tuple(parts))


@contextmanager
def packed_pool(directory: Path, sizes: tuple[int, int]) -> Iterator[tuple[WindowPool, bytes]]:
    path = directory / "experts.bin"
    contents = np.random.default_rng(0).bytes(2 * EXPERTS * sum(sizes))
    path.write_bytes(contents)
    file = StorageFile(path)
    layers = [layer(path, index, index * EXPERTS * sum(sizes), sizes) for index in range(2)]
    pool = WindowPool(layers, {path: file}, packed=True)
    try:
        yield pool, contents
    finally:
        pool.close()
        file.close()


def test_packed_experts_lie_side_by_side_as_an_engine_expects_that_knows_only_sizes(tmp_path: Path) -> None:
    sizes = (3 * PAGE, 2 * PAGE)
    with packed_pool(tmp_path, sizes) as (pool, contents):
        assert [placement.stride for placement in pool.placements.values()] == [*sizes, *sizes]
        manager = OffloadManager(experts={0: EXPERTS, 1: EXPERTS}, top_k={0: 2, 1: 2}, pool=pool, budget=3 * sum(sizes))
        try:
            for index, experts in [(0, [4, 0]), (1, [1, 2]), (0, [3, 1]), (1, [2, 4])]:
                with manager.acquire(index, experts):
                    for stage, (role, size) in enumerate(zip(("gate_up", "down"), sizes, strict=True)):
                        base = pool.placements[f"{index}.{role}"].address
                        start = index * EXPERTS * sum(sizes) + stage * EXPERTS * sizes[0]
                        for expert in experts:
                            found = bytes(pages.view(base + expert * size, size))
                            assert found == contents[start + expert * size : start + (expert + 1) * size]
            assert manager.stats().peak_resident_bytes <= 3 * sum(sizes)
        finally:
            manager.close()


@pytest.mark.parametrize("sizes", [(PAGE + 2, PAGE), (PAGE, PAGE // 2)])
def test_packed_experts_that_would_share_pages_are_refused(tmp_path: Path, sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="share pages"), packed_pool(tmp_path, sizes):
        pass
