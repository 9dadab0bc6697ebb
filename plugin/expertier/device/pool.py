"""Slots on a device, filled from host memory where it has the expert and from the disk where it has not."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.budget import format_bytes
from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.device.host import HostArena
from expertier.device.link import DEMOTE, Bytes, DeviceBytes, DeviceEvent, DeviceLink, Fence, whole_pages
from expertier.errors import BudgetError, ExpertLoadError, UnsupportedModelError
from expertier.residency.base import IntArray
from expertier.residency.pool import KeepScores, PlannedRead
from expertier.storage import DEMAND, PAGE, PREFETCH, StorageFile, Transfer

_AHEAD: Final = 2  # chunks of prefetches under way on the link: what a demand copy waits behind at most


class PieceCheck(Protocol):
    """Looks at the bytes of one part of an expert as they come from the disk."""

    def add(self, offset: int, piece: memoryview) -> None:
        """Take in some of them, in any order."""

    def finish(self) -> None:
        """Raise when they were wrong."""


CheckFor = Callable[[str, int], "PieceCheck | None"]


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """What a device tier holds and moved, in bytes where nothing else is said.

    Attributes
    ----------
    device_bytes, host_bytes : int
        Memory allocated for experts: slots on the device; slots and read buffers on the host.
    pinned : bool
        Whether the host memory is locked.
    resident_bytes, host_resident_bytes : int
        Experts in it.
    double_bytes : int
        Experts that are on the device and on the host at once, as they count on the host.
    disk_loads, host_loads : int
        Loads to the device by where the expert was.
    disk_bytes, link_bytes, demoted_bytes : int
        Read from the disk; copied to the device; copied from the device when an expert had to leave it.
    demotions : int
        Experts that left the device for the host.
    """

    device_bytes: int
    host_bytes: int
    pinned: bool
    resident_bytes: int
    host_resident_bytes: int
    double_bytes: int
    disk_loads: int
    host_loads: int
    disk_bytes: int
    link_bytes: int
    demoted_bytes: int
    demotions: int


class _Slab:
    """Slots of one shape."""

    def __init__(self, link: DeviceLink, parts: Sequence[ExpertPart], slots: int) -> None:
        self.sizes = [part.expert_bytes for part in parts]
        self.slots = slots
        self.parts = [link.allocate(slots * size) for size in self.sizes]
        self.free = list(range(slots))[::-1]
        self.fences = [Fence() for _ in range(slots)]
        self.computed = np.full(slots, None, object)  # latest point at which the computation used the slot

    def piece(self, stage: int, slot: int, start: int = 0, stop: int | None = None) -> DeviceBytes:
        size = self.sizes[stage]
        return self.parts[stage][slot * size + start : slot * size + (size if stop is None else stop)]

    def before_writing(self, slot: int) -> list[DeviceEvent]:
        events = self.fences[slot].before_writing()
        used: DeviceEvent | None = self.computed[slot]
        if used is not None and not used.done():
            events.append(used)
        return events


@dataclass(eq=False)
class _Load:
    """An expert on its way to the device."""

    expert: int
    slab: _Slab
    slot: int
    host: int  # slot on the host, -1 for none
    warm: bool  # the host has the bytes
    after: list[DeviceEvent]  # what may still use the slot on the device
    host_after: list[DeviceEvent]  # what may still use the slot on the host
    left: int  # parts that have not arrived


class DevicePool:
    """Expert slots on a device over a tier of host memory; implements :class:`expertier.residency.pool.TieredPool`.

    The device holds the experts that the manager's policy ranks highest, the host those that follow: one that leaves
    the device is copied back if the host has no copy and something less worth keeping. While the host has room for
    more, it keeps a copy of what is on the device, too, and such doubles are the first to go.

    Parameters
    ----------
    layers : sequence of LayerExperts
        Layers with routed experts, ascending; their parts begin on pages of their files, every expert of them.
    files : mapping of Path to StorageFile
        Open files by path.
    link : DeviceLink
        The device.
    device_bytes, host_bytes : int
        Most memory for experts on either side. The host's includes buffers for reads.
    io_threads, chunk_bytes : int
        As in :class:`expertier.manager.ManagerConfig`: a chunk is what is read, and copied, at a time.
    check_for : callable, optional
        Called with tensor name and expert when a read from the disk is planned; returns what looks at the bytes.
    per_layer : bool
        Whether every layer has slots of its own, the same number each, instead of sharing them all.

    Attributes
    ----------
    moves : int
        How often an expert was given a slot: while it stays the same, and all experts have one, none moves.

    Raises
    ------
    BudgetError
        Memory cannot be had, or is too little for buffers or for a token's experts.
    UnsupportedModelError
        Experts of several sizes are to share slots.
    ValueError
        Experts share pages of their file.
    """

    def __init__(
        self,
        layers: Sequence[LayerExperts],
        files: Mapping[Path, StorageFile],
        link: DeviceLink,
        *,
        device_bytes: int,
        host_bytes: int,
        io_threads: int = 2,
        chunk_bytes: int = 2 << 20,
        check_for: CheckFor | None = None,
        per_layer: bool = False,
    ) -> None:
        self._layers = {layer.layer: layer for layer in layers}
        self._files = files
        self._link = link
        self._check_for = check_for
        counts = [layer.experts for layer in layers]
        self._base = dict(zip(self._layers, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        self._lock = threading.RLock()
        self._scores: KeepScores = lambda experts, layer: np.zeros(len(experts))
        self._offsets = {layer.layer: _offsets(layer) for layer in layers}
        buffer = whole_pages(chunk_bytes + chunk_bytes // 4)
        buffers = 2 * io_threads
        total = sum(counts)
        host_slot = max(offsets[-1] for offsets in self._offsets.values())
        host_slots = min((host_bytes - buffers * buffer) // host_slot, total)
        try:
            for part in (part for layer in layers for part in layer.parts):
                if part.offset % PAGE or part.stride % PAGE:
                    raise ValueError(f"experts of {part.name} share pages in {part.file}")
            if host_slots < 0:
                raise BudgetError(
                    f"A host budget of {format_bytes(host_bytes)} has no room for the buffers of {io_threads} I/O "
                    f"threads ({format_bytes(buffers * buffer)}).",
                    f"Give at least {buffers * buffer} bytes.",
                )
            self._make_slabs(layers, device_bytes, per_layer)
            self._buffers: queue.SimpleQueue[tuple[Bytes, DeviceEvent | None]] = queue.SimpleQueue()
            memory = link.allocate_host(buffers * buffer + host_slots * host_slot)
        except BaseException:
            link.close()
            raise
        for index in range(buffers):
            self._buffers.put((memory[index * buffer : (index + 1) * buffer], None))
        self.host = HostArena(memory[buffers * buffer :], host_slot, total)
        self._host_bytes, self._host_slot = len(memory), host_slot
        self._sizes = np.repeat([layer.expert_bytes for layer in layers], counts)

        self.moves = 0
        self._slot_of = np.full(total, -1, np.int32)
        self._complete = np.zeros(total, bool)  # every byte was sent to the device
        self._arriving = np.zeros(total, bool)  # some of them may be under way
        self._loads: dict[int, _Load] = {}
        self._ahead: deque[DeviceEvent] = deque()
        self._disk_loads = self._host_loads = self._disk_bytes = self._link_bytes = 0
        self._demoted_bytes = self._demotions = 0

    def _make_slabs(self, layers: Sequence[LayerExperts], device_bytes: int, per_layer: bool) -> None:
        self._slabs: dict[int, _Slab] = {}
        self.quotas: dict[int, int] | None = None
        if per_layer:
            slots = device_bytes // sum(layer.expert_bytes for layer in layers)
            for layer in layers:
                if slots < layer.top_k:
                    raise BudgetError(
                        f"A device budget of {format_bytes(device_bytes)} leaves {slots} slots for each layer, a token "
                        f"needs {layer.top_k} experts.",
                        f"Give at least {layer.top_k * sum(each.expert_bytes for each in layers)} bytes.",
                    )
                self._slabs[layer.layer] = _Slab(self._link, layer.parts, min(slots, layer.experts))
            self.quotas = {layer: slab.slots * sum(slab.sizes) for layer, slab in self._slabs.items()}
            return
        shapes = {tuple(part.expert_bytes for part in layer.parts) for layer in layers}
        if len(shapes) > 1:
            raise UnsupportedModelError(
                "The layers' experts have different sizes, so they cannot share slots on a device.",
                "Give every layer slots of its own.",
            )
        experts = sum(layer.experts for layer in layers)
        shared = _Slab(self._link, layers[0].parts, min(device_bytes // layers[0].expert_bytes, experts))
        self._slabs = {layer.layer: shared for layer in layers}

    @property
    def capacity(self) -> int:
        """Bytes of all slots on the device: the largest possible budget."""
        return sum(slab.slots * sum(slab.sizes) for slab in set(self._slabs.values()))

    def memory(self, layer: int) -> list[DeviceBytes]:
        """The slots that a layer's experts are in, part by part: slot after slot, on the device."""
        return self._slabs[layer].parts

    # ---- TieredPool

    def rank_by(self, scores: KeepScores) -> None:
        self._scores = scores

    def slot_bytes(self, layer: int) -> int:
        return self._layers[layer].expert_bytes

    def stages(self, layer: int) -> int:
        return len(self._layers[layer].parts)

    def place(self, layer: int, expert: int, recycled: tuple[int, int] | None) -> Sequence[PlannedRead]:
        index, slab = self._base[layer] + expert, self._slabs[layer]
        with self._lock:
            if recycled is None:
                if not slab.free:
                    raise ExpertLoadError(f"No slot on the device is free for expert {expert} of layer {layer}.")
                slot = slab.free.pop()
            else:
                slot = self._vacate(*recycled)
                if (other := self._slabs[recycled[0]]) is not slab:
                    other.free.append(slot)
                    slot = slab.free.pop()  # below its quota a layer has a free one
            load = self._plan(index, slab, slot)
        return [self._read(load, layer, expert, stage) for stage in range(len(slab.sizes))]

    def drop(self, layer: int, expert: int) -> None:
        with self._lock:
            if self._slot_of[self._base[layer] + expert] >= 0:
                slot = self._vacate(layer, expert)
                self._slabs[layer].free.append(slot)

    def close(self) -> None:
        self._link.close()
        self._slabs.clear()

    # ---- who is where; called with the lock held

    def _plan(self, index: int, slab: _Slab, slot: int) -> _Load:
        host = self.host
        warm = host.holds(index)
        place = int(host.slot_of[index]) if warm else host.take_free(index)
        fence = host.fences[place] if place >= 0 else None
        load = _Load(
            expert=index,
            slab=slab,
            slot=slot,
            host=place,
            warm=warm,
            after=slab.before_writing(slot),
            host_after=[] if fence is None else fence.before_reading() if warm else fence.before_writing(),
            left=len(slab.sizes),
        )
        if place >= 0:
            host.claimed[place] = True
        self._slot_of[index] = slot
        self.moves += 1
        self._arriving[index] = True
        self._loads[index] = load
        return load

    def _vacate(self, layer: int, expert: int) -> int:
        """Take an expert off its slot, to the host if it is worth it there, and return the slot."""
        index = self._base[layer] + expert
        slot = int(self._slot_of[index])
        load = self._loads.pop(index, None)
        if load is not None:  # it never arrived
            if load.host >= 0 and load.warm:
                self.host.claimed[load.host] = False
            elif load.host >= 0:
                self.host.give_up(index)
        elif not self.host.holds(index):
            self._demote(layer, index, slot)
        self._slot_of[index] = -1
        self._complete[index] = self._arriving[index] = False
        return slot

    def _demote(self, layer: int, index: int, slot: int) -> None:
        place = self.host.take(index, self._complete, lambda experts: self._scores(experts, layer))
        if place < 0:
            return
        slab, fence, offsets = self._slabs[layer], self.host.fences[place], self._offsets[layer]
        after = slab.fences[slot].before_reading() + fence.before_writing()
        for stage, size in enumerate(slab.sizes):
            target = self.host.bytes_at(place, offsets[stage], offsets[stage] + size)
            event = self._link.copy(target, slab.piece(stage, slot), DEMOTE, after)
            slab.fences[slot].reads(DEMOTE, event)
            fence.writes(DEMOTE, event)
            self._demoted_bytes += size
        self.host.complete[place] = True
        self._demotions += 1

    # ---- how bytes move; called in I/O threads without locks

    def _read(self, load: _Load, layer: int, expert: int, stage: int) -> PlannedRead:
        part, base = self._layers[layer].parts[stage], self._offsets[layer][stage]
        file, offset = self._files[part.file], part.offset + expert * part.stride
        check: PieceCheck | None = None
        if load.warm:
            transfer: Transfer = partial(self._from_host, load, stage, base)
        else:
            check = None if self._check_for is None else self._check_for(part.name, expert)
            transfer = partial(self._from_disk, load, stage, base, (file, offset), check)
        return PlannedRead(
            stage=stage,
            file=file,
            offset=offset,
            view=load.slab.piece(stage, load.slot),
            needed=part.expert_bytes,
            check=partial(self._arrived, load, check),
            transfer=transfer,
        )

    def _from_host(self, load: _Load, stage: int, base: int, start: int, stop: int, priority: int) -> None:
        self._send(load, stage, start, self.host.bytes_at(load.host, base + start, base + stop), priority)

    def _from_disk(
        self,
        load: _Load,
        stage: int,
        base: int,
        source: tuple[StorageFile, int],
        check: PieceCheck | None,
        start: int,
        stop: int,
        priority: int,
    ) -> None:
        size = stop - start
        kept = load.host >= 0
        if kept:
            target, before = (
                self.host.bytes_at(load.host, base + start, base + start + whole_pages(size)),
                load.host_after,
            )
        else:
            target, last = self._buffers.get()
            before = [] if last is None else [last]
        event: DeviceEvent | None = None
        try:
            for earlier in before:
                earlier.wait()
            piece = target[: whole_pages(size)].data
            source[0].read_into(piece, source[1] + start, size)
            if check is not None:
                check.add(start, piece[:size])
            event = self._send(load, stage, start, target[:size], priority)
        finally:
            if not kept:
                self._buffers.put((target, event))
        with self._lock:
            self._disk_bytes += size

    def _send(self, load: _Load, stage: int, start: int, source: Bytes, priority: int) -> DeviceEvent:
        target = load.slab.piece(stage, load.slot, start, start + len(source))
        lane = DEMAND if priority == DEMAND else PREFETCH
        with self._lock:  # or a thread that was overtaken would note the older event of the lane
            after = [event for event in load.after if not event.done()]
            if load.warm:
                after += [event for event in load.host_after if not event.done()]
            event = self._link.copy(target, source, lane, after)
            load.slab.fences[load.slot].writes(lane, event)
            if load.host >= 0:
                self.host.fences[load.host].reads(lane, event)
            self._link_bytes += len(source)
            held = None
            if lane == PREFETCH:
                self._ahead.append(event)
                held = self._ahead.popleft() if len(self._ahead) > _AHEAD else None
        if held is not None:
            held.wait()
        return event

    def _arrived(self, load: _Load, check: PieceCheck | None, _: memoryview) -> None:
        if check is not None:
            check.finish()
        with self._lock:
            load.left -= 1
            if load.left:
                return
            del self._loads[load.expert]
            self._complete[load.expert] = True
            if load.host >= 0:
                self.host.complete[load.host] = True
                self.host.claimed[load.host] = False
            if load.warm:
                self._host_loads += 1
            else:
                self._disk_loads += 1

    # ---- computing

    def slots(self, layer: int) -> NDArray[np.int32]:
        """Slot of every expert of a layer in :meth:`memory`, -1 for those that are not there, shape ``(experts,)``."""
        here = slice(self._base[layer], self._base[layer] + self._layers[layer].experts)
        return np.where(self._complete[here], self._slot_of[here], np.int32(-1))

    def order(self, layer: int, experts: IntArray) -> None:
        """Have the computation wait, on the device, until what was sent of these experts is there."""
        index = self._base[layer] + experts
        fences = self._slabs[layer].fences
        for expert in index[self._arriving[index]].tolist():
            events = fences[self._slot_of[expert]].before_reading()
            for event in events:
                self._link.order(event)
            if not events:
                self._arriving[expert] = False

    def used(self, layer: int, experts: IntArray) -> None:
        """Note that what the computation was given so far may read these experts; call it before they are released."""
        self._slabs[layer].computed[self._slot_of[self._base[layer] + experts]] = self._link.mark()

    def stats(self) -> TierStats:
        """Return a snapshot of what is where and what was moved."""
        with self._lock:
            slot = self._host_slot
            return TierStats(
                device_bytes=self.capacity,
                host_bytes=self._host_bytes,
                pinned=self._link.pinned,
                resident_bytes=int(self._sizes[self._complete].sum()),
                host_resident_bytes=self.host.held * slot,
                double_bytes=self.host.doubles(self._complete) * slot,
                disk_loads=self._disk_loads,
                host_loads=self._host_loads,
                disk_bytes=self._disk_bytes,
                link_bytes=self._link_bytes,
                demoted_bytes=self._demoted_bytes,
                demotions=self._demotions,
            )


def _offsets(layer: LayerExperts) -> list[int]:
    """Where each part begins in a slot on the host, and where the slot ends."""
    sizes = [whole_pages(part.expert_bytes) for part in layer.parts]
    return [sum(sizes[:stage]) for stage in range(len(sizes) + 1)]
