"""Expert windows: where an expert lies, what backs it, and what happens to neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.errors import UnsupportedModelError
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


def test_packed_experts_of_odd_sizes_are_kept_off_each_others_pages(tmp_path: Path) -> None:
    sizes = (PAGE + 1024, PAGE // 2)
    path = tmp_path / "experts.bin"
    room = 2 * PAGE  # in the file every expert begins on a page
    contents = np.random.default_rng(1).bytes(2 * EXPERTS * room)
    path.write_bytes(contents)
    odd = layer(path, 0, 0, sizes)
    parts = tuple(
        replace(part, offset=index * EXPERTS * room, padded_bytes=room) for index, part in enumerate(odd.parts)
    )
    file = StorageFile(path)
    pool = WindowPool([replace(odd, parts=parts)], {path: file}, packed=True)
    manager = OffloadManager(experts={0: EXPERTS}, top_k={0: 2}, pool=pool, budget=2 * pool.slot_bytes(0))
    try:
        assert pool.spacing == {0: 4}
        assert pool.slot_bytes(0) == 3 * PAGE
        for experts in ([4, 0], [1, 2], [3, 4]):
            with manager.acquire(0, experts):
                for part in parts:
                    base = pool.placements[part.name].address
                    for expert in experts:
                        found = bytes(pages.view(base + 4 * expert * part.expert_bytes, part.expert_bytes))
                        start = part.offset + expert * room
                        assert found == contents[start : start + part.expert_bytes]
        assert manager.stats().peak_resident_bytes <= 6 * PAGE
    finally:
        manager.close()
        pool.close()
        file.close()


LARGE = (5 << 20, 5 << 19)  # two and a half and one and a quarter huge pages


@contextmanager
def large_experts(directory: Path) -> Iterator[tuple[OffloadManager, WindowPool]]:
    """Two layers of experts that are zeros but for their first and last bytes."""
    path = directory / "experts.bin"
    layers = [layer(path, index, index * EXPERTS * sum(LARGE), LARGE) for index in range(2)]
    with path.open("wb") as file:
        for part in (part for one in layers for part in one.parts):
            for expert in range(EXPERTS):
                start = part.offset + expert * part.expert_bytes
                for place, data in [
                    (start, _mark(part, expert)),
                    (start + part.expert_bytes - 8, _mark(part, ~expert)),
                ]:
                    file.seek(place)
                    file.write(data)
    storage = StorageFile(path)
    pool = WindowPool(layers, {path: storage}, packed=True)
    manager = OffloadManager(experts={0: EXPERTS, 1: EXPERTS}, top_k={0: 2, 1: 2}, pool=pool, budget=3 * sum(LARGE))
    try:
        yield manager, pool
    finally:
        manager.close()
        storage.close()


def _mark(part: ExpertPart, expert: int) -> bytes:
    return np.array([100 * part.layer + 10 * len(part.role) + expert], "<i8").tobytes()


def _check_large(manager: OffloadManager, pool: WindowPool, spacing: int) -> None:
    for index, experts in [(0, [4, 0]), (1, [1, 2]), (0, [3, 1]), (1, [2, 4])]:
        with manager.acquire(index, experts):
            for role, size in zip(("gate_up", "down"), LARGE, strict=True):
                part = layer(Path(), index, 0, LARGE).parts[role == "down"]
                base = pool.placements[f"{index}.{role}"].address
                for expert in experts:
                    start = base + spacing * expert * size
                    assert bytes(pages.view(start, 8)) == _mark(part, expert)
                    assert bytes(pages.view(start + size - 8, 8)) == _mark(part, ~expert)
    assert manager.stats().peak_resident_bytes <= 3 * sum(LARGE)


def test_packed_experts_larger_than_a_huge_page_begin_on_one(tmp_path: Path) -> None:
    with large_experts(tmp_path) as (manager, pool):
        assert pool.spacing == {0: 4, 1: 4}
        for (_, role), placement in zip([(0, 0), (0, 1), (1, 0), (1, 1)], pool.placements.values(), strict=True):
            assert placement.address % pages.HUGE_PAGE == 0
            assert placement.stride == 4 * LARGE[role]
            assert placement.stride % pages.HUGE_PAGE == 0
        _check_large(manager, pool, 4)


@pytest.mark.parametrize(("sizes", "spacing"), [((6 << 20, 3 << 20), 2), ((5 << 20, 5 << 18), 2), ((2 << 20, PAGE), 1)])
def test_the_smallest_spacing_that_suits_all_parts_is_taken(
    tmp_path: Path, sizes: tuple[int, int], spacing: int
) -> None:
    pool = WindowPool([layer(tmp_path, 0, 0, sizes)], {tmp_path: None}, packed=True)  # type: ignore[dict-item]
    try:
        assert pool.spacing == {0: spacing}
    finally:
        pool.close()


def test_parts_that_would_need_too_much_address_space_begin_on_ordinary_pages(tmp_path: Path) -> None:
    sizes = ((2 << 20) + PAGE, PAGE)
    pool = WindowPool([layer(tmp_path, 0, 0, sizes)], {tmp_path: None}, packed=True)  # type: ignore[dict-item]
    try:
        assert pool.spacing == {0: 1}
    finally:
        pool.close()


def test_where_address_space_is_short_experts_lie_closer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = pages.reserve

    def limited(size: int) -> int:
        if size > EXPERTS * max(LARGE):
            raise OSError(12, "Cannot allocate memory")
        return reserve(size)

    monkeypatch.setattr(pages, "reserve", limited)
    with large_experts(tmp_path) as (manager, pool):
        assert pool.spacing == {0: 1, 1: 1}
        _check_large(manager, pool, 1)


def test_packed_experts_that_share_pages_in_their_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not begin on a page"), packed_pool(tmp_path, (PAGE + 2, PAGE)):
        pass


def test_experts_of_odd_sizes_that_no_address_space_can_hold_are_refused_by_name(tmp_path: Path) -> None:
    huge = layer(tmp_path, 0, 0, ((1 << 40) + 2, PAGE))
    parts = tuple(replace(part, padded_bytes=(1 << 40) + PAGE) for part in huge.parts)
    with pytest.raises(UnsupportedModelError, match="of address space"):
        WindowPool([replace(huge, parts=parts)], {tmp_path: None}, packed=True)  # type: ignore[dict-item]
