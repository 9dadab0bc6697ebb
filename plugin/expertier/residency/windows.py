"""Where experts live: every expert has a window of its own in reserved address space.

Engines compute an expert's address as ``base + expert * stride``. Where the stride is free to choose (llama.cpp:
``tensor.nb[2]``), the parts of a layer share one: expert ``e`` occupies one contiguous window with its parts one after
the other. Where it is the size of the part (vLLM's CPU kernels), every part has windows of its own, and if that size is
no multiple of the page size, or of a huge page's, only every so many'th number is an expert's. No page is shared
between experts. A window is either backed by memory or inaccessible, and the memory of an expert that leaves moves
under the window of the one that comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expertier.budget import format_bytes
from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.errors import ExpertLoadError, UnsupportedModelError
from expertier.residency import pages
from expertier.residency.pages import HUGE_PAGE, PAGE
from expertier.residency.pool import PlannedRead
from expertier.storage import StorageFile

_MOST_SPACING = 16  # numbers that an expert may take up so that its memory can be huge pages


@dataclass(frozen=True, kw_only=True)
class PartPlacement:
    """Where one part of every expert lies.

    Attributes
    ----------
    name : str
        Tensor name.
    address : int
        Address of expert 0's first byte.
    stride : int
        Bytes from one expert to the next.
    stage : int
        Order of use within the layer.
    """

    name: str
    address: int
    stride: int
    stage: int


@dataclass(frozen=True, kw_only=True)
class _WindowPart:
    """One part of every expert in a window: where it comes from and where it goes."""

    stage: int
    file: StorageFile
    part: ExpertPart
    address: int  # of expert 0


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Parts whose windows move together."""

    base: int
    stride: int
    size: int
    parts: tuple[_WindowPart, ...]

    def start(self, expert: int) -> int:
        return (self.base + expert * self.stride) // PAGE * PAGE


class WindowPool:
    """Expert windows of all layers; implements :class:`expertier.residency.pool.ExpertPool`.

    Parameters
    ----------
    layers : sequence of LayerExperts
        Layers with routed experts.
    files : mapping of Path to StorageFile
        Open files by path.
    check_for : callable, optional
        Called with tensor name and expert when a read is planned; returns what has to look at the bytes, if anything.
    packed : bool
        Whether the engine computes addresses from sizes: what it takes for number ``n`` lies at ``n`` times the size of
        one. Expert ``e`` then goes by the number ``e * spacing``. File offsets must be multiples of the page size.

    Attributes
    ----------
    spacing : dict of int to int
        By layer, the smallest factor that keeps experts off each other's pages in all parts: 1 where sizes are
        multiples of the page size, at most a page's bytes. Where 16 are enough, it is the smallest that also has the
        parts that are larger than a huge page begin on one: only then does memory that moves from one expert to
        another stay in huge pages. What lies between is address space and nothing more.

    Raises
    ------
    ValueError
        When `packed` is asked for experts that do not begin on a page in their file.
    UnsupportedModelError
        The process has not enough address space.

    Notes
    -----
    Direct reads need memory and file offset to agree modulo the page size, for every expert of a tensor. They do when
    the stride is congruent to the expert's stride in the file modulo the page size, so parts share a window only if
    their sizes are congruent; in practice quantised expert sizes are page multiples and a layer has one window per
    expert.
    """

    def __init__(
        self,
        layers: Sequence[LayerExperts],
        files: Mapping[Path, StorageFile],
        check_for: Callable[[str, int], Callable[[memoryview], None] | None] | None = None,
        *,
        packed: bool = False,
    ) -> None:
        self._check_for = check_for
        self._windows: dict[int, list[_Window]] = {}
        self._regions: list[tuple[int, int]] = []
        self.placements: dict[str, PartPlacement] = {}
        self.spacing: dict[int, int] = {}
        self._stages = {layer.layer: len(layer.parts) for layer in layers}
        try:
            for layer in layers:
                lay_out = self._lay_out_packed if packed else self._lay_out
                self._windows[layer.layer] = lay_out(layer, files)
        except BaseException:
            self.close()
            raise

    def _lay_out(self, layer: LayerExperts, files: Mapping[Path, StorageFile]) -> list[_Window]:
        groups: dict[int, list[int]] = {}
        for stage, part in enumerate(layer.parts):
            groups.setdefault(part.stride % PAGE, []).append(stage)
        windows = []
        for drift, stages in groups.items():
            offset = 0
            starts = {}
            for stage in stages:
                part = layer.parts[stage]
                starts[stage] = offset + part.offset % PAGE
                # A drifting phase needs one more page per part, so that neighbours never share one.
                offset = -(-(starts[stage] + part.expert_bytes) // PAGE) * PAGE + (PAGE if drift else 0)
            size = offset + (PAGE if drift else 0)
            stride = -(-size // HUGE_PAGE) * HUGE_PAGE + drift
            region = -(-(stride * layer.experts + size) // PAGE) * PAGE
            base = pages.reserve(region)
            self._regions.append((base, region))
            parts = []
            for stage in stages:
                part = layer.parts[stage]
                address = base + starts[stage]
                parts.append(_WindowPart(stage=stage, file=files[part.file], part=part, address=address))
                self.placements[part.name] = PartPlacement(name=part.name, address=address, stride=stride, stage=stage)
            windows.append(_Window(base=base, stride=stride, size=size, parts=tuple(parts)))
        return windows

    def _lay_out_packed(self, layer: LayerExperts, files: Mapping[Path, StorageFile]) -> list[_Window]:
        sizes = [part.expert_bytes for part in layer.parts]
        # Powers of two: the largest is a multiple of all.
        usual = max(_spacing(size, PAGE) for size in sizes)
        roomy = max(_spacing(size, HUGE_PAGE if size >= HUGE_PAGE else PAGE) for size in sizes)
        if usual < roomy <= _MOST_SPACING:
            known = len(self._regions)
            try:
                return self._lay_out_spaced(layer, files, roomy)
            except UnsupportedModelError:  # address space is limited: go on with less of it
                for address, size in self._regions[known:]:
                    pages.unmap(address, size)
                del self._regions[known:]
        return self._lay_out_spaced(layer, files, usual)

    def _lay_out_spaced(self, layer: LayerExperts, files: Mapping[Path, StorageFile], spacing: int) -> list[_Window]:
        windows = []
        self.spacing[layer.layer] = spacing
        for stage, part in enumerate(layer.parts):
            if part.offset % PAGE or part.stride % PAGE:
                raise ValueError(f"experts of {part.name} do not begin on a page of {part.file}")
            size = -(-part.expert_bytes // PAGE) * PAGE
            stride = spacing * part.expert_bytes
            region = stride * layer.experts
            try:
                base = pages.reserve(region)
            except OSError as error:
                raise UnsupportedModelError(
                    f"{part.name} needs {format_bytes(region)} of address space, because an expert's "
                    f"{part.expert_bytes} bytes are no multiple of the page size {PAGE}: {error.strerror}.",
                    "Raise the limit on address space (ulimit -v), or start without Expertier.",
                ) from error
            self._regions.append((base, region))
            placed = _WindowPart(stage=stage, file=files[part.file], part=part, address=base)
            windows.append(_Window(base=base, stride=stride, size=size, parts=(placed,)))
            self.placements[part.name] = PartPlacement(name=part.name, address=base, stride=stride, stage=stage)
        return windows

    # ---- ExpertPool

    def slot_bytes(self, layer: int) -> int:
        return sum(window.size for window in self._windows[layer])

    def stages(self, layer: int) -> int:
        return self._stages[layer]

    def read_bytes(self, layer: int) -> tuple[int, ...]:
        """Bytes read to load an expert of `layer`, padding included: one number if it is the same for all."""
        parts = [placed.part for window in self._windows[layer] for placed in window.parts]
        counts = [
            sum(-(-((part.offset + expert * part.stride) % PAGE + part.expert_bytes) // PAGE) * PAGE for part in parts)
            for expert in range(parts[0].experts)
        ]
        return tuple(counts) if len(set(counts)) > 1 else tuple(counts[:1])

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        windows = self._windows[layer]
        fresh = False
        if recycled != (layer, expert):
            try:
                if not (recycled and self._take_over(recycled, (layer, expert))):
                    fresh = True
                    for window in windows:
                        pages.back(window.start(expert), window.size, huge=window.size >= HUGE_PAGE)
            except OSError as error:
                raise ExpertLoadError(
                    f"No memory mapping for expert {expert} of layer {layer}: {error.strerror}.",
                    "Raise the limit on mappings (sysctl vm.max_map_count) or lower the expert budget.",
                ) from error
        reads = []
        for window in windows:
            for placed in window.parts:
                source = placed.part.offset + expert * placed.part.stride
                target = placed.address + expert * window.stride
                lead = source % PAGE
                size = placed.part.expert_bytes
                length = -(-(lead + size) // PAGE) * PAGE
                reads.append(
                    PlannedRead(
                        stage=placed.stage,
                        file=placed.file,
                        offset=source - lead,
                        view=pages.view(target - lead, length),
                        needed=lead + size,
                        check=self._check_for(placed.part.name, expert) if self._check_for else None,
                        prepare=pages.populate if fresh else None,
                    )
                )
        return reads

    def _take_over(self, source: tuple[int, int], target: tuple[int, int]) -> bool:
        old, new = self._windows[source[0]], self._windows[target[0]]
        if [window.size for window in old] != [window.size for window in new]:
            self.drop(*source)
            return False
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            if not pages.move(before.start(source[1]), after.start(target[1]), before.size):
                for window in old[index:]:
                    pages.release(window.start(source[1]), window.size)
                for window in new[index:]:
                    pages.back(window.start(target[1]), window.size, huge=window.size >= HUGE_PAGE)
                break
        return True

    def drop(self, layer: int, expert: int) -> None:
        for window in self._windows[layer]:
            pages.release(window.start(expert), window.size)

    def close(self) -> None:
        for address, size in self._regions:
            pages.unmap(address, size)
        self._regions.clear()


def _spacing(size: int, page: int) -> int:
    """The smallest factor that has every expert of so many bytes begin on a page."""
    return page // math.gcd(size, page)
