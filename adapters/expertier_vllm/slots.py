"""Experts in slots: what a device needs, whose memory cannot be moved under an expert's address as windows are.

The kernel is given a layer's slots in place of its experts, and every expert's number is replaced by that of its slot.
Which slot an expert is in changes nothing it computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.budget import format_bytes
from expertier.catalog.pack import Pack
from expertier.catalog.types import LayerExperts
from expertier.device import CudaLink, DeviceLink, DeviceTier, ThreadLink
from expertier.errors import UnsupportedEngineError
from expertier.manager import ManagerConfig
from expertier.planning.memory import memory_left
from expertier.storage import StorageFile
from expertier_vllm.stage import ExpertStage

_BUFFERS: Final = 64 << 20  # more than what I/O threads read through


def link_to(device: torch.device) -> DeviceLink:
    """Return the way to the device on which a layer computes.

    Raises
    ------
    UnsupportedEngineError
        There is none.
    """
    if device.type == "cuda":
        return CudaLink(device)
    if device.type == "cpu":
        return ThreadLink()
    raise UnsupportedEngineError(f"Expertier has no way to a device of type {device.type}.", "Start without it.")


def usual_host_bytes(total: int, sharers: int) -> int:
    """Size of the tier beneath a device, unless somebody says it: room for all experts, at most half of what is left.

    Parameters
    ----------
    total : int
        Bytes of all experts of the worker.
    sharers : int
        Workers on this machine.
    """
    return min(total + total // 64 + _BUFFERS, memory_left().left // (2 * sharers))


class ExpertSlots:
    """The expert layers of one worker in a device tier, each with slots of its own.

    Parameters
    ----------
    stages : sequence of ExpertStage
        The layers, in order.
    layers : sequence of LayerExperts
        The same, as they are in the sidecar.
    files : mapping of Path to StorageFile
        The sidecar, opened.
    pack : Pack
        The sidecar.
    resident : sequence of mapping of str to Tensor
        For every layer, what has one value for all its experts, by part name.
    device : torch.device
        Where the layers compute.
    device_bytes, host_bytes : int
        Most memory for experts there and on the host beneath.
    config : ManagerConfig
        Policy and I/O settings.
    """

    def __init__(
        self,
        stages: Sequence[ExpertStage],
        layers: Sequence[LayerExperts],
        files: Mapping[Path, StorageFile],
        pack: Pack,
        resident: Sequence[Mapping[str, torch.Tensor]],
        *,
        device: torch.device,
        device_bytes: int,
        host_bytes: int,
        config: ManagerConfig,
    ) -> None:
        self.tier = DeviceTier(
            layers,
            files,
            link_to(device),
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            config=config,
            check_for=pack.check_in_pieces,
            per_layer=True,  # one kernel call takes no more slots than a layer has experts
        )
        self._device = device
        self._experts = {layer.layer: np.arange(layer.experts) for layer in layers}
        self._places: dict[int, torch.Tensor] = {}
        self._noted = -1
        for stage, layer, common in zip(stages, layers, resident, strict=True):
            slots = {}
            for part, memory in zip(layer.parts, self.tier.pool.memory(layer.layer), strict=True):
                row = stage.row(part.name)
                slots[part.name] = torch.as_tensor(memory).view(row.dtype).view(-1, *row.shape)
            stage.settle_in_slots(slots, common)

    def capacity(self, layer: int) -> int:
        """Experts of a layer that can be on the device at once."""
        pool = self.tier.pool
        assert pool.quotas is not None
        return min(pool.quotas[layer], self.tier.manager.budget) // pool.slot_bytes(layer)

    @contextmanager
    def working_set(self, layer: int, routes: NDArray[np.int64], ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Bring experts to the device, and yield the slots that `ids` are in, of its shape and type."""
        with self.tier.acquire(layer, routes) as found:
            slots = torch.from_numpy(found.slots).to(ids.device, ids.dtype)
            yield slots[ids.long()]

    def hold(self) -> None:
        """Note where the experts are, for a step in which all of them are on the device and pinned."""
        pool = self.tier.pool
        if pool.moves != self._noted:
            self._places = {layer: torch.from_numpy(pool.slots(layer)).to(self._device) for layer in self._experts}
            self._noted = pool.moves
        for layer, experts in self._experts.items():
            pool.order(layer, experts)

    def renumbered(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """The slots that `ids` are in, of its shape and type; after :meth:`hold`. Nobody waits for the device."""
        return self._places[layer][ids.long()].to(ids.dtype)

    def used(self) -> None:
        """Note that what was computed since :meth:`hold` may read any expert; to be called before they are released."""
        for layer, experts in self._experts.items():
            self.tier.pool.used(layer, experts)

    def words(self) -> str:
        """For the mode line."""
        stats = self.tier.stats()
        kind = "pinned host memory" if stats.pinned else "host memory"
        return f"in slots over {format_bytes(stats.host_bytes)} of {kind}"
