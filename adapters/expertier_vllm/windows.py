"""Experts in windows of address space, which the kernel takes for all of a layer's experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.config import OffloadOptions
from expertier.manager import Lease, ManagerConfig, OffloadManager
from expertier.residency.windows import WindowPool
from expertier_vllm.layers import LoadedExperts
from expertier_vllm.worker_budget import WorkerBudget


class _Held:
    """A lease, and the numbers that the kernel knows its experts by; fulfils :class:`expertier_vllm.places.Held`."""

    __slots__ = ("_lease", "numbers", "wait")

    def __init__(self, lease: Lease, numbers: torch.Tensor) -> None:
        self._lease = lease
        self.numbers = numbers
        self.wait = lease.wait

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.release()


class ExpertWindows:
    """The expert layers of one worker in windows; implements :class:`expertier_vllm.places.ExpertPlaces`.

    Parameters
    ----------
    found : LoadedExperts
        The experts.
    options : OffloadOptions
        Budget and I/O settings.
    policy : str
        Who stays.
    hard : bool
        Whether stand-ins never wait: every layer then keeps a token's experts, and swaps bring the others.
    sharers : int
        Workers on this machine.

    Attributes
    ----------
    pool : WindowPool
        The windows.
    """

    ahead_in_warm_ups = True

    def __init__(self, found: LoadedExperts, options: OffloadOptions, *, policy: str, hard: bool, sharers: int) -> None:
        layers = found.layers
        self.pool = pool = WindowPool(layers, {found.pack.path: found.file}, found.pack.check, packed=True)
        try:
            for stage in found.stages:
                stage.spacing = pool.spacing[stage.layer]
            token = [layer.top_k * pool.slot_bytes(layer.layer) for layer in layers]
            smallest = sum(token) if hard else max(token)
            whole = [layer.experts * pool.slot_bytes(layer.layer) for layer in layers]
            self.budget = WorkerBudget(
                options,
                smallest=smallest,
                largest=sum(whole),
                one_layer=max(smallest, *whole),
                always=found.always,
                sharers=sharers,
            )
            self.manager = OffloadManager(
                experts={layer.layer: layer.experts for layer in layers},
                top_k={layer.layer: layer.top_k for layer in layers},
                pool=pool,
                budget=self.budget.first,
                config=ManagerConfig(
                    policy=policy,
                    half_life=options.half_life,
                    io_threads=options.io_threads,
                    fill=not hard,
                    every_layer=hard,
                ),
            )
        except BaseException:
            pool.close()
            raise
        self.budget.attach(self.manager)
        self.largest = max(pool.slot_bytes(layer.layer) for layer in layers)
        addresses = {name: placement.address for name, placement in pool.placements.items()}
        for stage, resident in zip(found.stages, found.resident(), strict=True):
            stage.settle(addresses, resident)

    def capacity(self, layer: int) -> int:
        return self.manager.capacity(layer)

    def acquire(self, layer: int, routes: NDArray[np.int64], ids: torch.Tensor) -> _Held:
        return _Held(self.manager.acquire(layer, routes, wait=False), ids)

    def hold(self) -> None:
        """Nothing to note: experts do not move."""

    def numbers(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def used(self) -> None:
        """Nothing to note: what was computed has read them."""

    def words(self) -> str:
        return ""

    def stats(self) -> dict[str, Any]:
        return {}
