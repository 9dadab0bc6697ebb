"""A ggml buffer type written in ctypes: expert tensors are placed in it and get addresses, but no memory."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Collection, Mapping

from expertier.errors import UnsupportedModelError
from expertier.residency import pages
from expertier.residency.pages import PAGE
from expertier.residency.windows import PartPlacement
from expertier_llamacpp import ggml

EXPERT_TENSORS = rb"ffn_(gate|up|down|gate_up)_exps\.weight"
"""Matched against tensor names by llama.cpp (``std::regex_search``); ``_chexps`` and shared experts do not match."""


_HIDDEN = b"\x01"  # first letter of an expert tensor's name while the model loads


class ExpertBufferType:
    """Receives expert tensors of one kind while a model loads and points them at their windows.

    Parameters
    ----------
    placements : mapping of str to PartPlacement
        Where each expert tensor lives, by tensor name.
    repacked : bool
        Whether the windows hold llama.cpp's repacked layout: the tensors then pose as CPU_REPACK tensors, so that the
        repacked kernels run on them.
    idle : collection of str
        Names of expert tensors that nobody computes with: they get an address behind which there is nothing.

    Notes
    -----
    llama.cpp skips tensors it has no data for (``llama_model_loader::load_all_data``: "this can happen with split
    experts models"), and looks data up by tensor name. So an expert tensor bears another name from the moment it
    gets its address until loading has ended, and not a byte of it is read, mapped or copied.
    """

    def __init__(self, placements: Mapping[str, PartPlacement], *, repacked: bool, idle: Collection[str] = ()) -> None:
        self._placements = placements
        self._idle = frozenset(idle)
        self._idle_tensors: dict[str, int] = {}
        self._reserved: dict[int, tuple[int, int]] = {}
        # llama.cpp tells buffer types apart by name.
        self._name = ctypes.create_string_buffer(b"Expertier_REPACK" if repacked else b"Expertier")
        self.tensors: dict[str, int] = {}
        self.error: Exception | None = None
        self._bound = False
        self._repack_type = ggml.repack_buffer_type() if repacked else 0
        self._stock_init: Callable[[int, int], int] | None = None
        if repacked:
            probe = ggml.base().ggml_backend_buft_alloc_buffer(self._repack_type, PAGE)
            interface = ggml.BufferInterface.from_address(probe)
            self._stock_init = ctypes.cast(interface.init_tensor, ggml.InitTensor)
            ggml.base().ggml_backend_buffer_free(probe)
        self._buffer_interface = ggml.BufferInterface(
            ggml.FreeBuffer(self._free),
            ggml.GetBase(lambda buffer: self._reserved[buffer][0]),
            ggml.InitTensor(self._init_tensor),
            ggml.MemsetTensor(lambda *_: None),
            ggml.TransferTensor(lambda *_: None),
            ggml.TransferTensor(lambda *_: None),
            None,
            None,
            None,
            ggml.Clear(lambda *_: None),
            None,
        )
        self._type = ggml.BufferType(
            ggml.BufferTypeInterface(
                ggml.GetName(lambda _: ctypes.addressof(self._name)),
                ggml.AllocBuffer(self._alloc),
                ggml.GetSize(lambda _: PAGE),
                ggml.GetSize(lambda _: 2**63 - 1),
                ggml.GetAllocSize(lambda _, tensor: ggml.Tensor.from_address(tensor).nb[3]),
                ggml.IsHost(lambda _: not repacked),
            ),
            None,
            None,
        )
        self.address = ctypes.addressof(self._type)

    def _alloc(self, _type: int, size: int) -> int | None:
        if self._bound:  # an adapter (LoRA) for an expert tensor asks for the same kind of memory: it gets real memory
            lib = ggml.base()
            buffer: int | None = lib.ggml_backend_buft_alloc_buffer(lib.ggml_backend_cpu_buffer_type(), size)
            return buffer
        try:
            address = pages.reserve(max(size, PAGE))
        except OSError as error:
            self.error = error
            return None
        own = ggml.base().ggml_backend_buffer_init(
            self._repack_type or self.address, self._buffer_interface, None, size
        )
        self._reserved[own] = (address, max(size, PAGE))
        return int(own)

    def _free(self, buffer: int) -> None:
        pages.unmap(*self._reserved.pop(buffer))

    def _init_tensor(self, buffer: int, address: int) -> int:
        tensor = ggml.Tensor.from_address(address)
        name = tensor.name.decode()
        placement = self._placements.get(name)
        if name in self._idle:
            tensor.name = _HIDDEN + tensor.name[len(_HIDDEN) :]
            self._idle_tensors[name] = address
            return 0
        if placement is None:
            self.error = UnsupportedModelError(
                f"llama.cpp placed {name} among the experts, the catalog does not know it.",
                "Please report the model's architecture.",
            )
            return -1  # GGML_STATUS_FAILED
        if self._stock_init is not None:
            self._stock_init(buffer, address)
            if not tensor.extra:
                self.error = UnsupportedModelError(f"llama.cpp cannot run {name} with repacked kernels on this CPU.")
                return -1
        tensor.data = placement.address
        tensor.name = _HIDDEN + tensor.name[len(_HIDDEN) :]
        self.tensors[name] = address
        return 0

    def bind(self) -> dict[int, tuple[str, int]]:
        """Finish loading: give every expert tensor the stride of its windows.

        Returns
        -------
        dict of int to (str, int)
            Address of each expert tensor to its name and stage.
        """
        missing = self._placements.keys() - self.tensors.keys()
        if missing:
            raise UnsupportedModelError(
                f"llama.cpp did not load the expert tensor {min(missing)}.", "Please report the model's architecture."
            )
        self._bound = True
        for name, address in self._idle_tensors.items():
            ggml.Tensor.from_address(address).name = name.encode()
        bound = {}
        for name, address in self.tensors.items():
            tensor, placement = ggml.Tensor.from_address(address), self._placements[name]
            tensor.name = name.encode()
            tensor.nb[3] = placement.stride * tensor.ne[2]
            tensor.nb[2] = placement.stride
            bound[address] = (name, placement.stage)
        return bound


class ExpertBuffers:
    """The buffer types of a model whose experts may be partly repacked.

    Which kernels multiply with a tensor, llama.cpp sees by its buffer. So repacked and plain parts need one each, and
    llama.cpp is told by tensor name which goes where.

    Parameters
    ----------
    placements : mapping of str to PartPlacement
        Where each expert tensor lives, by tensor name.
    repacked : collection of str
        Names of the tensors whose windows hold llama.cpp's repacked layout.
    idle : collection of str
        Names of expert tensors that nobody computes with.

    Attributes
    ----------
    overrides : ctypes array
        For ``llama_model_params.tensor_buft_overrides``.
    """

    def __init__(
        self, placements: Mapping[str, PartPlacement], repacked: Collection[str], idle: Collection[str] = ()
    ) -> None:
        self._types: list[ExpertBufferType] = []
        overrides = []
        for packed in (True, False):
            mine = {name: placement for name, placement in placements.items() if (name in repacked) == packed}
            if mine or not packed:  # the plain one also meets what the catalog does not know
                kind = ExpertBufferType(mine, repacked=packed, idle=() if packed else idle)
                self._types.append(kind)
                pattern = _pattern(mine) if packed else EXPERT_TENSORS
                overrides.append(ggml.BufferOverride(pattern, kind.address))
        overrides.append(ggml.BufferOverride(None, None))
        self.overrides = (ggml.BufferOverride * len(overrides))(*overrides)

    @property
    def error(self) -> Exception | None:
        """What went wrong while llama.cpp loaded the model."""
        return next((kind.error for kind in self._types if kind.error is not None), None)

    def bind(self) -> dict[int, tuple[str, int]]:
        """Finish loading; see :meth:`ExpertBufferType.bind`."""
        bound = {}
        for kind in self._types:
            bound.update(kind.bind())
        return bound


def _pattern(names: Collection[str]) -> bytes:
    """Build a regular expression that matches exactly these expert tensors.

    llama.cpp compiles it anew for every tensor of the model: layers that have the same parts share a branch.
    """
    parts: dict[str, set[str]] = {}
    for name in names:
        _, layer, rest = name.split(".", 2)
        parts.setdefault(layer, set()).add(rest)
    layers: dict[tuple[str, ...], list[str]] = {}
    for layer, found in parts.items():
        layers.setdefault(tuple(sorted(found)), []).append(layer)
    branches = (
        rf"blk\.({'|'.join(numbers)})\.({'|'.join(re.escape(rest) for rest in found)})"
        for found, numbers in layers.items()
    )
    return f"^({'|'.join(branches)})$".encode()
