"""A layer's working set, pinned."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from expertier.residency.base import IntArray
from expertier.telemetry import PhaseCounters

if TYPE_CHECKING:
    from expertier.manager.manager import OffloadManager


class Lease:
    """A layer's working set, pinned until released. Use it as a context manager or call :meth:`release`.

    Attributes
    ----------
    layer : int
        The layer.
    """

    __slots__ = ("_experts", "_manager", "_phase", "_released", "_stages_ready", "_waiting", "layer")

    def __init__(
        self, manager: OffloadManager, layer: int, experts: IntArray, waiting: IntArray | None, phase: PhaseCounters
    ) -> None:
        self.layer = layer
        self._manager = manager
        self._experts = experts
        self._waiting = waiting  # experts that were not resident at the start; None once all are
        self._stages_ready = 0
        self._phase = phase
        self._released = False

    def __len__(self) -> int:
        return len(self._experts)

    def ready(self, stage: int) -> bool:
        """Whether everything up to `stage` has arrived, without waiting."""
        return self._waiting is None or stage < self._stages_ready or self._manager._stage_ready(self._waiting, stage)

    def wait(self, stage: int | None = None) -> None:
        """Block until every expert of the set has arrived, up to and including `stage` (``None``: completely).

        Raises
        ------
        ExpertLoadError
            When one of the experts could not be read.
        """
        if self._waiting is not None and (stage is None or stage >= self._stages_ready):
            self._manager._wait(self, stage)

    def release(self) -> None:
        """Unpin the working set. Releasing twice does nothing."""
        if not self._released:
            self._released = True
            self._manager._release(self._experts)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
