"""Expert memory that holds nothing, below the real offload manager."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from expertier.residency.pool import PlannedRead
from expertier.routing.trace_format import TraceLayer


class EmptyPool:
    """Loads in no time; implements :class:`expertier.residency.pool.ExpertPool`.

    Parameters
    ----------
    layers : sequence of TraceLayer
        The model.
    """

    def __init__(self, layers: Sequence[TraceLayer]) -> None:
        self._layers = {layer.layer: layer for layer in layers}
        self._bytes = {layer.layer: layer.load_bytes().tolist() for layer in layers}

    def slot_bytes(self, layer: int) -> int:
        return self._layers[layer].slot_bytes

    def stages(self, layer: int) -> int:
        return 1

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        return ()

    def drop(self, layer: int, expert: int) -> None:
        pass

    def close(self) -> None:
        pass


class InstantPool(EmptyPool):
    """Notes what was loaded.

    Attributes
    ----------
    loads : list of int
        Experts placed since somebody last looked, numbered over all layers.
    """

    def __init__(self, layers: Sequence[TraceLayer]) -> None:
        super().__init__(layers)
        self._base: dict[int, int] = {}
        count = 0
        for layer in layers:
            self._base[layer.layer] = count
            count += layer.experts
        self.loads: list[int] = []

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        self.loads.append(self._base[layer] + expert)
        return ()


class CountingPool(EmptyPool):
    """Counts loads.

    Attributes
    ----------
    loads, bytes_read : int
        So far.
    """

    loads = bytes_read = 0

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        self.loads += 1
        self.bytes_read += self._bytes[layer][expert]
        return ()


class PlanningPool(EmptyPool):
    """Says what would have to be read, for a simulated device."""

    def stages(self, layer: int) -> int:
        return self._layers[layer].stages

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        stages, total = self._layers[layer].stages, self._bytes[layer][expert]
        return [
            PlannedRead(
                stage=stage,
                file=cast(Any, None),
                offset=0,
                view=memoryview(b""),
                needed=total * (stage + 1) // stages - total * stage // stages,
            )
            for stage in range(stages)
        ]
