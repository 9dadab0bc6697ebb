"""Experts on a device: the pool, the manager that decides about it, and what an engine does around a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expertier.budget import format_bytes
from expertier.catalog.types import LayerExperts
from expertier.device.link import DeviceLink
from expertier.device.pool import CheckFor, DevicePool, TierStats
from expertier.errors import BudgetError
from expertier.manager import Lease, ManagerConfig, OffloadManager
from expertier.planning.memory import memory_left
from expertier.residency.base import IntArray
from expertier.storage import StorageFile


class WorkingSet:
    """A layer's experts on the device, from :meth:`DeviceTier.acquire` until they are released.

    Attributes
    ----------
    slots : ndarray of int32, shape (experts,)
        Where each expert of the layer is in :meth:`DevicePool.memory`; -1 for those that are not on the device.
    """

    __slots__ = ("_experts", "_lease", "_pool", "slots")

    def __init__(self, pool: DevicePool, lease: Lease, experts: IntArray) -> None:
        self._pool = pool
        self._lease = lease
        self._experts = experts
        self.slots: NDArray[np.int32] = pool.slots(lease.layer)

    def release(self) -> None:
        """Let the experts go once the computation that was given so far has read them; waits for nothing."""
        self._pool.used(self._lease.layer, self._experts)
        self._lease.release()

    def __enter__(self) -> WorkingSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class DeviceTier:
    """Three tiers under one policy: a device, host memory beneath it, and the disk beneath that.

    Parameters
    ----------
    layers, files, link, check_for, per_layer
        As for :class:`DevicePool`.
    device_bytes, host_bytes : int
        Most memory for experts on either side.
    config : ManagerConfig, optional
        Policy and I/O settings; quotas are the pool's.

    Attributes
    ----------
    manager : OffloadManager
        Decides who is on the device; its budget is the device's.
    pool : DevicePool
        Slots, and the tier beneath.

    Raises
    ------
    BudgetError
        A budget is below the smallest working set, or more than there is.

    Notes
    -----
    A load counts as arrived when its last copy has been issued. Nobody waits on the host for a copy: the computation is
    ordered behind it on the device, and a copy into a slot behind the last computation that read it.
    """

    def __init__(
        self,
        layers: Sequence[LayerExperts],
        files: Mapping[Path, StorageFile],
        link: DeviceLink,
        *,
        device_bytes: int,
        host_bytes: int,
        config: ManagerConfig | None = None,
        check_for: CheckFor | None = None,
        per_layer: bool = False,
    ) -> None:
        config = config or ManagerConfig()
        limit = memory_left()
        if host_bytes > limit.left:
            link.close()
            raise BudgetError(
                f"A host budget of {format_bytes(host_bytes)} exceeds what {limit.source} has left "
                f"({format_bytes(limit.left)}).",
                "Lower host_budget; the system cannot take pinned memory back.",
            )
        self.pool = DevicePool(
            layers,
            files,
            link,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            io_threads=config.io_threads,
            chunk_bytes=config.chunk_bytes,
            check_for=check_for,
            per_layer=per_layer,
        )
        try:
            self.manager = OffloadManager(
                experts={layer.layer: layer.experts for layer in layers},
                top_k={layer.layer: layer.top_k for layer in layers},
                pool=self.pool,
                budget=self.pool.capacity or device_bytes,
                config=replace(config, quotas=self.pool.quotas),
            )
        except BaseException:
            self.pool.close()
            raise

    def acquire(self, layer: int, routes: ArrayLike) -> WorkingSet:
        """Bring a layer's working set to the device, and order what is computed next behind its arrival.

        Parameters
        ----------
        layer : int
            The layer.
        routes : array_like of int, shape (tokens, top_k)
            What the router chose.

        Raises
        ------
        BudgetError, ExpertLoadError
            As :meth:`expertier.manager.OffloadManager.acquire`.
        """
        wanted = np.unique(np.asarray(routes, np.int64))
        lease = self.manager.acquire(layer, wanted)
        try:
            self.pool.order(layer, wanted)
            return WorkingSet(self.pool, lease, wanted)
        except BaseException:
            lease.release()
            raise

    def resize(self, budget: int) -> None:
        """Change how much of the device's slots may be used; they themselves stay allocated.

        Raises
        ------
        BudgetError
            More than there are slots for, or as :meth:`expertier.manager.OffloadManager.resize`.
        """
        if budget > self.pool.capacity:
            raise BudgetError(
                f"The device has slots for {format_bytes(self.pool.capacity)}, not {format_bytes(budget)}.",
                "Slots are allocated once: start again with the larger budget.",
            )
        self.manager.resize(budget)

    def stats(self) -> TierStats:
        """Return what is where and what was moved; hits and stalls are the manager's."""
        return self.pool.stats()

    def close(self) -> None:
        """Stop all copies and give all memory back."""
        self.manager.close()
