"""Where a worker's experts are while it serves: what a forward pass asks of windows and of slots alike."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.manager import OffloadManager
from expertier_vllm.worker_budget import WorkerBudget


class Held(Protocol):
    """A layer's working set, pinned.

    Attributes
    ----------
    numbers : Tensor, shape and type of the ids it was asked for with
        What the kernel knows these experts by.
    """

    numbers: torch.Tensor

    def wait(self) -> None:
        """Block until all of it has arrived.

        Raises
        ------
        ExpertLoadError
            An expert could not be read.
        """


class ExpertPlaces(Protocol):
    """The memory of all expert layers of a worker.

    Attributes
    ----------
    manager : OffloadManager
        Decides who is there.
    budget : WorkerBudget
        What the experts may hold.
    largest : int
        Bytes of the largest expert.
    ahead_in_warm_ups : bool
        Whether experts may be loaded ahead in steps that serve nobody. Not on a device: while graphs are captured no
        other thread may use it.
    """

    manager: OffloadManager
    budget: WorkerBudget
    largest: int
    ahead_in_warm_ups: bool

    def capacity(self, layer: int) -> int:
        """Experts of a layer that can be there at once."""

    def acquire(self, layer: int, routes: NDArray[np.int64], ids: torch.Tensor) -> AbstractContextManager[Held]:
        """Pin a layer's working set and load what is absent of it.

        Parameters
        ----------
        layer : int
            The layer.
        routes : ndarray of int64
            Its experts, in any shape.
        ids : Tensor
            Numbers of experts, all of them in `routes`.

        Raises
        ------
        BudgetError, ExpertLoadError
            As :meth:`expertier.manager.OffloadManager.acquire`.
        """

    def hold(self) -> None:
        """Note where the experts are, for a step in which all of them are there and pinned."""

    def numbers(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """What the kernel knows experts by in such a step, of the shape and type of `ids`. Nobody waits."""

    def used(self) -> None:
        """Note that what was computed since :meth:`hold` may read any expert; called before they are released."""

    def words(self) -> str:
        """For the mode line; empty, or ends in a comma and a blank."""

    def stats(self) -> dict[str, Any]:
        """Counters besides the manager's, as plain data."""
