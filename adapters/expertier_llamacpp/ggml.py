"""ctypes mirror of the few ggml internals Expertier touches, for the llama.cpp that llama-cpp-python 0.3.36 vendors.

Everything that depends on the layout of a ggml structure is in this file, each with the upstream symbol it mirrors.
:func:`self_check` proves the mirror against the loaded library before anything relies on it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import POINTER, c_bool, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path

import llama_cpp

from expertier.errors import UnsupportedEngineError

VERIFIED_VERSIONS = ("0.3.36",)


class Tensor(ctypes.Structure):
    """Upstream: ``struct ggml_tensor`` (ggml/include/ggml.h)."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    )


# Upstream: struct ggml_backend_buffer_type_i and ggml_backend_buffer_i (ggml/src/ggml-backend-impl.h).
GetName = ctypes.CFUNCTYPE(c_void_p, c_void_p)
AllocBuffer = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_size_t)
GetSize = ctypes.CFUNCTYPE(c_size_t, c_void_p)
GetAllocSize = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_void_p)
IsHost = ctypes.CFUNCTYPE(c_bool, c_void_p)
FreeBuffer = ctypes.CFUNCTYPE(None, c_void_p)
GetBase = ctypes.CFUNCTYPE(c_void_p, c_void_p)
InitTensor = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)
MemsetTensor = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_uint8, c_size_t, c_size_t)
TransferTensor = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_size_t, c_size_t)
Clear = ctypes.CFUNCTYPE(None, c_void_p, c_uint8)


class BufferTypeInterface(ctypes.Structure):
    """Upstream: ``struct ggml_backend_buffer_type_i``."""

    _fields_ = (
        ("get_name", GetName),
        ("alloc_buffer", AllocBuffer),
        ("get_alignment", GetSize),
        ("get_max_size", GetSize),
        ("get_alloc_size", GetAllocSize),
        ("is_host", IsHost),
    )


class BufferType(ctypes.Structure):
    """Upstream: ``struct ggml_backend_buffer_type``."""

    _fields_ = (("iface", BufferTypeInterface), ("device", c_void_p), ("context", c_void_p))


class BufferInterface(ctypes.Structure):
    """Upstream: ``struct ggml_backend_buffer_i``."""

    _fields_ = (
        ("free_buffer", FreeBuffer),
        ("get_base", GetBase),
        ("init_tensor", InitTensor),
        ("memset_tensor", MemsetTensor),
        ("set_tensor", TransferTensor),
        ("get_tensor", TransferTensor),
        ("set_tensor_2d", c_void_p),
        ("get_tensor_2d", c_void_p),
        ("cpy_tensor", c_void_p),
        ("clear", Clear),
        ("reset", c_void_p),
    )


class BufferOverride(ctypes.Structure):
    """Upstream: ``struct llama_model_tensor_buft_override`` (include/llama.h)."""

    _fields_ = (("pattern", c_char_p), ("buft", c_void_p))


EvalCallback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback

NAME_OFFSET = Tensor.name.offset
OP_OFFSET = Tensor.op.offset
SRC_OFFSET = Tensor.src.offset

MEMORY = (c_uint8 * (1 << 47)).from_address(0)
"""This process's memory as bytes: indexing it is the quickest read of a node's op that ctypes offers."""

WORDS = (c_size_t * (1 << 44)).from_address(0)
"""The same as machine words; index with ``address >> 3`` (structures are 8-byte aligned)."""


@functools.cache
def library(stem: str) -> ctypes.CDLL:
    """Return the loaded ggml library whose file name starts with `stem`.

    Wheels ship every library under three real names (``.so``, ``.so.0``, ``.so.0.x``): opening another name than the
    one libllama uses would load a second copy with its own globals, so the path comes from the process's own maps.
    """
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and Path(fields[5].strip()).name.startswith(stem + ".so"):
                return ctypes.CDLL(fields[5].strip())
    raise UnsupportedEngineError(
        f"llama-cpp-python is loaded, but not its library {stem}.",
        "Expertier needs a build with shared libraries (the default); rebuild without -DBUILD_SHARED_LIBS=OFF.",
    )


@functools.cache
def base() -> ctypes.CDLL:
    """libggml-base with the signatures used here."""
    lib = library("libggml-base")
    lib.ggml_backend_buffer_init.restype = c_void_p
    lib.ggml_backend_buffer_init.argtypes = [c_void_p, BufferInterface, c_void_p, c_size_t]
    lib.ggml_backend_buft_alloc_buffer.restype = c_void_p
    lib.ggml_backend_buft_alloc_buffer.argtypes = [c_void_p, c_size_t]
    lib.ggml_backend_cpu_buffer_type.restype = c_void_p
    lib.ggml_backend_buffer_free.restype = None
    lib.ggml_backend_buffer_free.argtypes = [c_void_p]
    lib.ggml_backend_buffer_get_base.restype = c_void_p
    lib.ggml_backend_buffer_get_base.argtypes = [c_void_p]
    lib.ggml_backend_buffer_get_size.restype = c_size_t
    lib.ggml_backend_buffer_get_size.argtypes = [c_void_p]
    lib.ggml_op_name.restype = c_char_p
    lib.ggml_op_name.argtypes = [c_int]
    lib.ggml_tensor_overhead.restype = c_size_t
    lib.ggml_type_size.restype = c_size_t
    lib.ggml_type_size.argtypes = [c_int]
    lib.ggml_row_size.restype = c_size_t
    lib.ggml_row_size.argtypes = [c_int, c_int64]
    return lib


@functools.cache
def op_number(name: str) -> int:
    """Value of ``enum ggml_op`` called `name` (e.g. ``MUL_MAT_ID``) in the loaded library."""
    names = base()
    for number in range(256):
        text = names.ggml_op_name(number)
        if text == name.encode():
            return number
        if text is None or (text == b"NONE" and number):
            break
    raise UnsupportedEngineError(f"This llama.cpp has no operation {name}.", f"Use one of {VERIFIED_VERSIONS}.")


def narrow_eval_callback(name_prefix: bytes, op: int) -> bool:
    """Have llama.cpp ask its eval callbacks only about nodes of `op` and nodes whose name starts with `name_prefix`.

    Only a build with ``patches/0001-c-level-eval-filter.patch`` can; the filter holds for the whole process.

    Returns
    -------
    bool
        Whether the build can.
    """
    if not hasattr(base(), "ggml_backend_sched_set_eval_filter"):
        return False
    base().ggml_backend_sched_set_eval_filter(c_char_p(name_prefix), c_int(op))
    return True


def repack_buffer_type() -> int:
    """Address of llama.cpp's CPU_REPACK buffer type.

    Upstream: ``ggml_backend_cpu_repack_buffer_type()`` (ggml/src/ggml-cpu/repack.cpp), exported with a C++ name.
    """
    function = library("libggml-cpu")._Z35ggml_backend_cpu_repack_buffer_typev
    function.restype = c_void_p
    return int(function())


@functools.cache
def self_check() -> None:
    """Refuse library versions and builds whose structures are not the mirrored ones.

    Raises
    ------
    UnsupportedEngineError
        For an unverified version (``EXPERTIER_UNVERIFIED=1`` lifts only this one), or when a probe tensor made by
        the library does not read back through the mirror.
    """
    version = llama_cpp.__version__
    if version not in VERIFIED_VERSIONS and os.environ.get("EXPERTIER_UNVERIFIED") != "1":
        raise UnsupportedEngineError(
            f"llama-cpp-python {version} was not verified with this Expertier.",
            f"Install llama-cpp-python=={VERIFIED_VERSIONS[-1]}, or set EXPERTIER_UNVERIFIED=1 to try: the structure "
            "checks still apply.",
        )
    if sys.platform != "linux" or sys.byteorder != "little" or ctypes.sizeof(c_void_p) != 8:
        raise UnsupportedEngineError("Expertier's llama.cpp adapter runs on 64-bit little-endian Linux only.")
    lib = base()

    class InitParams(ctypes.Structure):
        """Upstream: ``struct ggml_init_params``."""

        _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))

    lib.ggml_init.restype = c_void_p
    lib.ggml_init.argtypes = [InitParams]
    lib.ggml_free.argtypes = [c_void_p]
    lib.ggml_new_tensor_3d.restype = POINTER(Tensor)
    lib.ggml_new_tensor_3d.argtypes = [c_void_p, c_int, c_int64, c_int64, c_int64]
    lib.ggml_set_name.restype = c_void_p
    lib.ggml_set_name.argtypes = [POINTER(Tensor), c_char_p]
    lib.ggml_mul_mat_id.restype = POINTER(Tensor)
    lib.ggml_mul_mat_id.argtypes = [c_void_p] + [POINTER(Tensor)] * 3
    context = lib.ggml_init(InitParams(8 * lib.ggml_tensor_overhead(), None, True))
    try:
        weights = lib.ggml_new_tensor_3d(context, 0, 8, 4, 3)
        rows = lib.ggml_new_tensor_3d(context, 0, 8, 1, 5)
        ids = lib.ggml_new_tensor_3d(context, 26, 2, 5, 1)  # GGML_TYPE_I32
        lib.ggml_set_name(weights, b"expertier-probe")
        product = lib.ggml_mul_mat_id(context, weights, rows, ids)
        sources = product.contents.src
        good = (
            weights.contents.name == b"expertier-probe"
            and list(weights.contents.ne) == [8, 4, 3, 1]
            and list(weights.contents.nb) == [4, 32, 128, 384]
            and weights.contents.data is None
            and product.contents.op == op_number("MUL_MAT_ID")
            and [sources[0], sources[1], sources[2], sources[3]]
            == [ctypes.addressof(item.contents) for item in (weights, rows, ids)] + [None]
        )
    finally:
        lib.ggml_free(context)
    if not good:
        raise UnsupportedEngineError(
            f"The ggml structures of llama-cpp-python {version} differ from those Expertier was written for.",
            f"Install llama-cpp-python=={VERIFIED_VERSIONS[-1]}.",
        )
