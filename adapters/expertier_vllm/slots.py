"""Experts in slots: what a device needs, whose memory cannot be moved under an expert's address as windows are.

The kernel is given a layer's slots in place of its experts, and every expert's number is replaced by that of its slot.
Which slot an expert is in changes nothing it computes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.budget import format_bytes, parse_budget
from expertier.config import OffloadOptions
from expertier.device import CudaLink, DeviceLink, DeviceTier, ThreadLink, WorkingSet
from expertier.errors import UnsupportedEngineError
from expertier.manager import ManagerConfig
from expertier.planning.memory import memory_left
from expertier_vllm.layers import LoadedExperts
from expertier_vllm.worker_budget import WorkerBudget

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


class _Held:
    """A working set, and the slots that ids are in; fulfils :class:`expertier_vllm.places.Held`."""

    __slots__ = ("_there", "numbers")

    def __init__(self, there: WorkingSet, ids: torch.Tensor) -> None:
        self._there = there
        slots = torch.from_numpy(there.slots).to(ids.device, ids.dtype)
        self.numbers = slots[ids.long()]

    def wait(self) -> None:
        """All of it was sent already, and the computation is ordered behind."""

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._there.release()


class ExpertSlots:
    """The expert layers of one worker in slots; implements :class:`expertier_vllm.places.ExpertPlaces`.

    Every layer has slots of its own in a device tier.

    Parameters
    ----------
    found : LoadedExperts
        The experts.
    options : OffloadOptions
        Budget and I/O settings.
    host_budget : str, int or None
        Most memory for experts on the host beneath, an amount or a share; ``None``: :func:`usual_host_bytes`.
    policy : str
        Who stays.
    sharers : int
        Workers on this machine.
    """

    ahead_in_warm_ups = False

    def __init__(
        self, found: LoadedExperts, options: OffloadOptions, *, host_budget: str | int | None, policy: str, sharers: int
    ) -> None:
        layers, self._device = found.layers, found.stages[0].device
        total = sum(layer.total_bytes for layer in layers)
        self.budget = WorkerBudget(
            options,
            smallest=sum(layer.top_k * layer.expert_bytes for layer in layers),  # every layer has slots of its own
            largest=total,
            one_layer=max(layer.total_bytes for layer in layers),
            always=found.always,
            sharers=sharers,
            on_host=self._device.type == "cpu",
        )
        host = usual_host_bytes(total, sharers) if host_budget is None else parse_budget(str(host_budget), total)
        assert host is not None and not self.budget.automatic  # "auto" was refused with the options
        self.tier = DeviceTier(
            layers,
            {found.pack.path: found.file},
            link_to(self._device),
            device_bytes=self.budget.first,
            host_bytes=host,
            config=ManagerConfig(policy=policy, half_life=options.half_life, io_threads=options.io_threads, fill=True),
            check_for=found.pack.check_in_pieces,
            per_layer=True,  # one kernel call takes no more slots than a layer has experts
        )
        self.manager = self.tier.manager
        self.budget.attach(self.manager, self.tier.resize)
        self.largest = max(layer.expert_bytes for layer in layers)
        self._experts = {layer.layer: np.arange(layer.experts) for layer in layers}
        self._places: dict[int, torch.Tensor] = {}
        self._noted = -1
        for stage, layer, resident in zip(found.stages, layers, found.resident(), strict=True):
            slots = {}
            for part, memory in zip(layer.parts, self.tier.pool.memory(layer.layer), strict=True):
                row = stage.row(part.name)
                slots[part.name] = torch.as_tensor(memory).view(row.dtype).view(-1, *row.shape)
            stage.settle_in_slots(slots, resident)

    def capacity(self, layer: int) -> int:
        pool = self.tier.pool
        assert pool.quotas is not None
        return min(pool.quotas[layer], self.manager.budget) // pool.slot_bytes(layer)

    def acquire(self, layer: int, routes: NDArray[np.int64], ids: torch.Tensor) -> _Held:
        there = self.tier.acquire(layer, routes)
        try:
            return _Held(there, ids)
        except BaseException:
            there.release()
            raise

    def hold(self) -> None:
        pool = self.tier.pool
        if pool.moves != self._noted:
            self._places = {layer: torch.from_numpy(pool.slots(layer)).to(self._device) for layer in self._experts}
            self._noted = pool.moves
        for layer, experts in self._experts.items():
            pool.order(layer, experts)

    def numbers(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        return self._places[layer][ids.long()].to(ids.dtype)

    def used(self) -> None:
        for layer, experts in self._experts.items():
            self.tier.pool.used(layer, experts)

    def words(self) -> str:
        stats = self.tier.stats()
        kind = "pinned host memory" if stats.pinned else "host memory"
        return f"in slots over {format_bytes(stats.host_bytes)} of {kind}, "

    def stats(self) -> dict[str, Any]:
        return {"tier": asdict(self.tier.stats())}
