"""Which experts default llama.cpp would repack on this CPU, and the sidecar file that holds them repacked.

llama.cpp rearranges ("repacks") weights while it loads a model, where it has kernels for the rearranged form. Those
kernels are faster than the plain ones, and round differently. To be as fast as default llama.cpp, and identical to it
bit by bit, experts must arrive repacked. Which tensors, and how, is never decided here: llama.cpp is asked, and its own
function does the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import POINTER, c_bool, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np

from expertier.budget import format_bytes
from expertier.catalog.gguf import GgufLayout, content_digest
from expertier.catalog.gguf_header import TENSOR_TYPES
from expertier.catalog.pack import SUFFIX, Check, Pack, PackKey, find_or_build
from expertier.catalog.sidecar import announced, sidecar_directories
from expertier.catalog.types import Catalog, ExpertPart, LayerExperts
from expertier.config import OffloadOptions
from expertier.errors import SidecarError
from expertier.residency import pages
from expertier.residency.pages import PAGE
from expertier.storage import StorageFile
from expertier_llamacpp import ggml
from expertier_llamacpp.loading import open_files

logger = logging.getLogger("expertier")

_THREADS = 2
_SLOTS = 2 * _THREADS  # experts in work or waiting to be written
_DEVICE_CPU, _DEVICE_ACCELERATOR = 0, 3  # upstream: enum ggml_backend_dev_type (ggml/include/ggml-backend.h)
_TAIL = len(PackKey(model="", content="", layout="", library="").short + SUFFIX)
_PROBE_TOKENS = 512  # what llama.cpp's own probe uses; kernels may depend on it
_TYPE_IDS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """With which kernels the experts are multiplied, and where they are read from for it.

    Attributes
    ----------
    layers : tuple of LayerExperts
        The catalog's layers; parts that run repacked point into the sidecar.
    repacked : frozenset of str
        Names of those parts.
    pack : Pack or None
        The sidecar.
    extra_buffer_types : bool
        llama.cpp's ``use_extra_bufts``: whether it may repack the other weights.
    words : str
        For the mode line.
    """

    layers: tuple[LayerExperts, ...]
    repacked: frozenset[str] = frozenset()
    pack: Pack | None = None
    extra_buffer_types: bool = True
    words: str = "kernels plain"

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that experts are read from, besides those of the model."""
        return () if self.pack is None else (self.pack.path,)

    @property
    def check_for(self) -> Callable[[str, int], Check | None] | None:
        """What looks at the experts of the sidecar when they arrive."""
        return None if self.pack is None else self.pack.check


def choose_kernels(catalog: Catalog, layouts: Sequence[GgufLayout], options: OffloadOptions) -> Kernels:
    """Decide how the experts are multiplied, and write the sidecar if it is needed and missing.

    Parameters
    ----------
    catalog : Catalog
        The model's experts.
    layouts : sequence of GgufLayout
        Headers of its files.
    options : OffloadOptions
        ``repack``, ``sidecar_dir`` and ``io_mode`` matter.

    Returns
    -------
    Kernels
        For ``repack='off'`` the plain kernels throughout. Otherwise those of default llama.cpp; if that needs a sidecar
        which cannot be had, ``auto`` falls back to the plain ones.

    Raises
    ------
    SidecarError
        ``repack='on'`` and the sidecar can be neither used nor written.
    """
    if options.repack == "off":
        return Kernels(layers=catalog.layers, extra_buffer_types=False, words="kernels plain (repack off)")
    repacker = Repacker()
    parts = [part for layer in catalog.layers for part in layer.parts if repacker.wants(part, layer.top_k)]
    if not parts:
        return Kernels(layers=catalog.layers, words="kernels plain (nothing to repack)")
    try:
        pack = _find_or_write(catalog, layouts, options, repacker, parts)
        layers = pack.layers(catalog.layers)
    except SidecarError as error:
        if options.repack == "on":
            raise
        logger.warning("Slower plain kernels are used, because there is no sidecar. %s", error)
        return Kernels(layers=catalog.layers, extra_buffer_types=False, words="kernels plain (no sidecar)")
    return Kernels(layers=layers, repacked=frozenset(pack.parts), pack=pack, words="kernels repacked (sidecar)")


class Repacker:
    """llama.cpp's repacking, asked and called through its own functions.

    Notes
    -----
    Nothing is cached between instances; one instance may be used from several threads.
    """

    def __init__(self) -> None:
        self._type = ggml.repack_buffer_type()
        # The functions of a buffer of this type are not exported; a buffer carries them.
        self._buffer = int(ggml.base().ggml_backend_buft_alloc_buffer(self._type, PAGE))
        interface = ggml.BufferInterface.from_address(self._buffer)
        self._init = ctypes.cast(interface.init_tensor, ggml.InitTensor)
        self._set = ctypes.cast(interface.set_tensor, ggml.TransferTensor)

    def __del__(self) -> None:
        if hasattr(self, "_buffer"):
            ggml.base().ggml_backend_buffer_free(self._buffer)

    def wants(self, part: ExpertPart, top_k: int) -> bool:
        """Whether default llama.cpp repacks this tensor on this machine.

        Goes through the buffer types in llama.cpp's order and takes the first whose device says it can multiply with
        the tensor (upstream: ``select_weight_buft`` in src/llama-model-loader.cpp, ``make_cpu_buft_list`` in
        src/llama-model.cpp).
        """
        number = _TYPE_IDS.get(part.type_name)
        return number is not None and _chosen_buffer_type(number, part.shape, top_k) == self._type

    def layout(self, parts: Sequence[ExpertPart]) -> str:
        """Digest that tells apart how repacked bytes lie: it repacks a known matrix of each kind and looks."""
        digest = hashlib.blake2b(digest_size=16)
        for type_name, rows in sorted({(part.type_name, part.shape[1]) for part in parts}):
            _, columns, block_bytes = TENSOR_TYPES[_TYPE_IDS[type_name]]
            known = (np.arange(rows * block_bytes, dtype=np.uint64) * 2654435761 >> 13).astype(np.uint8)
            result = np.empty_like(known)
            with _quiet:
                self.repack(type_name, (columns, rows), known.ctypes.data, result.ctypes.data)
            digest.update(f"{type_name} {rows} ".encode())
            digest.update(result.tobytes())
        return digest.hexdigest()

    def repack(self, type_name: str, shape: tuple[int, int], source: int, target: int) -> None:
        """Repack one matrix.

        Parameters
        ----------
        type_name : str
            Storage type.
        shape : tuple of int
            Columns and rows.
        source, target : int
            Addresses of the plain matrix and of the room for the repacked one, equally large.

        Raises
        ------
        SidecarError
            llama.cpp has no repacked form for it.
        """
        tensor = _tensor(_TYPE_IDS[type_name], *shape)
        tensor.buffer, tensor.data = self._buffer, target
        self._init(self._buffer, ctypes.addressof(tensor))
        if not tensor.extra:
            raise SidecarError(f"llama.cpp has no repacked form for {shape[1]} rows of {type_name} on this CPU.")
        self._set(self._buffer, ctypes.addressof(tensor), source, 0, tensor.nb[3])


class _Quiet(contextlib.AbstractContextManager[None]):
    """Keeps llama.cpp's line about each repacked matrix from the log: there is one per expert.

    The log function belongs to the process, so all uses share one replacement, which is never freed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._previous, self._data = _LogFunction(), c_void_p()
        self._replacement = _LogFunction(self._pass_on)

    def _pass_on(self, level: int, text: bytes, data: int | None) -> None:
        if not text.startswith(b"repack: "):
            self._previous(level, text, data)

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                ggml.base().ggml_log_get(ctypes.byref(self._previous), ctypes.byref(self._data))
                ggml.base().ggml_log_set(self._replacement, self._data)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                ggml.base().ggml_log_set(self._previous, self._data)


_LogFunction = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)  # upstream: ggml_log_callback (ggml/include/ggml.h)
_quiet = _Quiet()


# ---- what llama.cpp would choose -------------------------------------------------------------------------------------


def _tensor(type_number: int, *sizes: int) -> ggml.Tensor:
    """A contiguous tensor without data."""
    tensor = ggml.Tensor(type=type_number)
    for axis in range(4):
        tensor.ne[axis] = sizes[axis] if axis < len(sizes) else 1
    tensor.nb[0] = ggml.base().ggml_type_size(type_number)
    tensor.nb[1] = ggml.base().ggml_row_size(type_number, tensor.ne[0])
    for axis in (2, 3):
        tensor.nb[axis] = tensor.nb[axis - 1] * tensor.ne[axis - 1]
    return tensor


@functools.cache
def _registry() -> ctypes.CDLL:
    lib = ggml.library("libggml")
    lib.ggml_backend_dev_count.restype = c_size_t
    lib.ggml_backend_dev_get.restype = c_void_p
    lib.ggml_backend_dev_get.argtypes = [c_size_t]
    return lib


@functools.cache
def _devices() -> ctypes.CDLL:
    lib = ggml.base()
    for name, result, arguments in (
        ("ggml_backend_dev_type", c_int, [c_void_p]),
        ("ggml_backend_dev_buffer_type", c_void_p, [c_void_p]),
        ("ggml_backend_dev_host_buffer_type", c_void_p, [c_void_p]),
        ("ggml_backend_dev_backend_reg", c_void_p, [c_void_p]),
        ("ggml_backend_dev_supports_op", c_bool, [c_void_p, POINTER(ggml.Tensor)]),
        ("ggml_backend_reg_get_proc_address", c_void_p, [c_void_p, c_char_p]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@functools.cache
def _buffer_types() -> tuple[tuple[int, int], ...]:
    """Device and buffer type of every place where default llama.cpp puts weights of the CPU, first choice first."""
    registry, api = _registry(), _devices()
    devices = [registry.ggml_backend_dev_get(index) for index in range(registry.ggml_backend_dev_count())]
    kinds = {device: api.ggml_backend_dev_type(device) for device in devices}
    cpus = [device for device in devices if kinds[device] == _DEVICE_CPU]
    plain = [(device, api.ggml_backend_dev_buffer_type(device)) for device in cpus]
    found = []
    for device in devices:
        if kinds[device] == _DEVICE_ACCELERATOR:
            accelerated = api.ggml_backend_dev_buffer_type(device)
            if accelerated != plain[0][1]:
                found.append((device, accelerated))
    for device in devices:
        if kinds[device] not in (_DEVICE_CPU, _DEVICE_ACCELERATOR):
            host = api.ggml_backend_dev_host_buffer_type(device)
            if host:
                found.append((device, host))
                break
    extras = api.ggml_backend_reg_get_proc_address(
        api.ggml_backend_dev_backend_reg(cpus[0]), b"ggml_backend_dev_get_extra_bufts"
    )
    if extras:
        listed = ctypes.CFUNCTYPE(c_void_p, c_void_p)(extras)(cpus[0])
        while listed and (extra := c_void_p.from_address(listed).value):
            found.append((cpus[0], extra))
            listed += ctypes.sizeof(c_void_p)
    return tuple(found + plain)


@functools.cache
def _chosen_buffer_type(type_number: int, shape: tuple[int, ...], top_k: int) -> int:
    """Buffer type that default llama.cpp gives an expert tensor of this type and shape; 0 if none fits."""
    weights = _tensor(type_number, *shape)
    rows = _tensor(_TYPE_IDS["F32"], shape[0], top_k, _PROBE_TOKENS)
    ids = _tensor(_TYPE_IDS["I32"], top_k, _PROBE_TOKENS)
    product = _tensor(_TYPE_IDS["F32"], shape[1], top_k, _PROBE_TOKENS)
    product.op = ggml.op_number("MUL_MAT_ID")
    for index, source in enumerate((weights, rows, ids)):
        product.src[index] = ctypes.addressof(source)
    for device, buffer_type in _buffer_types():
        weights.buffer = ggml.base().ggml_backend_buft_alloc_buffer(buffer_type, 0)
        supported = _devices().ggml_backend_dev_supports_op(device, product)
        ggml.base().ggml_backend_buffer_free(weights.buffer)
        if supported:
            return buffer_type
    return 0


# ---- the file --------------------------------------------------------------------------------------------------------


def _find_or_write(
    catalog: Catalog,
    layouts: Sequence[GgufLayout],
    options: OffloadOptions,
    repacker: Repacker,
    parts: Sequence[ExpertPart],
) -> Pack:
    key = PackKey(
        model=catalog.fingerprint,
        content=content_digest(layouts),
        layout=repacker.layout(parts),
        library=f"llama-cpp-python {llama_cpp.__version__}",
    )
    return find_or_build(
        sidecar_directories(catalog.path.parent, options.sidecar_dir),
        f"{catalog.path.stem}.{key.short}{SUFFIX}",
        key=key,
        parts=parts,
        produce=lambda: _repacked(repacker, parts, options),
        announce=_announce,
    )


class _Scratch:
    """Room for one matrix as it is in the model, and repacked."""

    def __init__(self, largest: int) -> None:
        self._size = -(-largest // PAGE) * PAGE + PAGE
        self.source = pages.scratch(self._size)
        self.target = pages.scratch(self._size)

    def close(self) -> None:
        pages.unmap(self.source, self._size)
        pages.unmap(self.target, self._size)


def _repacked(
    repacker: Repacker, parts: Sequence[ExpertPart], options: OffloadOptions
) -> Generator[memoryview, None, None]:
    """Yield every expert repacked, in order; reading and repacking run ahead on a few threads."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet)
        files = open_files(sorted({part.file for part in parts}), options.io_mode)
        for file in files.values():
            stack.callback(file.close)
        largest = max(part.expert_bytes for part in parts)
        slots = [_Scratch(largest) for _ in range(_SLOTS)]
        for slot in slots:
            stack.callback(slot.close)
        threads = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="expertier-repack"))
        stack.callback(threads.shutdown, cancel_futures=True)
        experts: Iterator[tuple[ExpertPart, int]] = ((part, index) for part in parts for index in range(part.experts))
        pending: deque[tuple[Future[memoryview], _Scratch]] = deque()
        free = slots
        while True:
            while free and (following := next(experts, None)) is not None:
                slot = free.pop()
                pending.append((threads.submit(_repack_one, repacker, files, *following, slot), slot))
            if not pending:
                return
            future, slot = pending.popleft()
            yield future.result()
            free.append(slot)


def _repack_one(
    repacker: Repacker, files: dict[Path, StorageFile], part: ExpertPart, expert: int, slot: _Scratch
) -> memoryview:
    offset = part.offset + expert * part.stride
    lead = offset % PAGE
    needed = lead + part.expert_bytes
    view = pages.view(slot.source, -(-needed // PAGE) * PAGE)
    files[part.file].read_into(view, offset - lead, needed)
    repacker.repack(part.type_name, (part.shape[0], part.shape[1]), slot.source + lead, slot.target)
    return pages.view(slot.target, part.expert_bytes)


def _announce(path: Path, size: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    text = f"expertier: writing repacked experts ({format_bytes(size)}) to {path}; needed once for this model and CPU"
    others = sorted(other.name for other in path.parent.glob(f"{glob.escape(path.name[:-_TAIL])}????????{SUFFIX}"))
    if others:
        text += f"\nexpertier: of other versions of model, engine or CPU, delete if not needed: {', '.join(others)}"
    return announced(text, size)
