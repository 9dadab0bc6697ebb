"""Experts of small checkpoints in the formats that quantisers write: names, types, and values that give lively routes.

Every format stores numbers between which nothing has to agree, so they are drawn and not computed from weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from support.raw_safetensors import Tensor

GROUP: Final = 64  # columns that share a scale in the int4 formats
BLOCK: Final = 128  # rows and columns that share one in fp8
FORMATS: Final = ("fp8", "fp8_static", "int8", "int4", "gptq", "awq")
_FP8_SPREAD: Final = 0.95  # standard deviation of what _fp8 draws
_INT8_SPREAD: Final = 73.3
_INT4_SPREAD: Final = 4.6


def configuration(kind: str, plain: list[str]) -> dict[str, Any]:
    """What ``config.json`` says about a format.

    Parameters
    ----------
    kind : str
        One of `FORMATS`.
    plain : list of str
        Linear layers that are not quantised.
    """
    if kind == "fp8":
        scheme: dict[str, Any] = {"activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
        return {"quant_method": "fp8", "modules_to_not_convert": plain, **scheme}
    if kind == "fp8_static":
        return {"quant_method": "fp8", "modules_to_not_convert": plain, "activation_scheme": "static"}
    if kind == "gptq":
        skip = {f"-:{name.replace('.', '[.]')}": {} for name in plain}
        return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "dynamic": skip}
    if kind == "awq":
        awq = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
        return {"quant_method": "awq", "modules_to_not_convert": plain, **awq}
    whole = kind == "int8"
    weights = {
        "num_bits": 8 if whole else 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else GROUP,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if whole else "pack-quantized",
        "ignore": plain,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs if whole else None}
        },
    }


def matrix(kind: str, name: str, rows: int, columns: int, spread: float, seed: int) -> Iterator[Tensor]:
    """Yield what a checkpoint has of one matrix of an expert.

    Parameters
    ----------
    kind : str
        One of `FORMATS`.
    name : str
        Of the matrix, without what follows the last dot.
    rows, columns : int
        Outputs and inputs.
    spread : float
        Standard deviation of the values that are meant.
    seed : int
        Of the checkpoint.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if kind.startswith("fp8"):
        yield Tensor(f"{name}.weight", "F8_E4M3", (rows, columns), _fp8(rng, (rows, columns)).tobytes())
        if kind == "fp8":
            shape = (-(-rows // BLOCK), -(-columns // BLOCK))
            yield _floats(f"{name}.weight_scale_inv", _around(rng, spread / _FP8_SPREAD, shape))
        else:
            yield _floats(f"{name}.weight_scale", _around(rng, spread / _FP8_SPREAD, ()))
            yield _floats(f"{name}.input_scale", _around(rng, 0.01, ()))
        return
    if kind == "int8":
        values = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
        yield Tensor(f"{name}.weight", "I8", (rows, columns), values.tobytes())
        yield _floats(f"{name}.weight_scale", _around(rng, spread / _INT8_SPREAD, (rows, 1)))
        return
    scale = spread / _INT4_SPREAD
    groups = columns // GROUP
    if kind in ("gptq", "awq"):
        packed = (columns // 8, rows) if kind == "gptq" else (columns, rows // 8)
        yield _integers(f"{name}.qweight", _words(rng, packed))
        symmetric = np.full((groups, rows // 8), 0x77777777, np.int32)
        yield _integers(f"{name}.qzeros", _words(rng, symmetric.shape, 7) if kind == "awq" else symmetric)
        yield _halves(f"{name}.scales", _around(rng, scale, (groups, rows)))
        if kind == "gptq":
            yield _integers(f"{name}.g_idx", np.arange(columns, dtype=np.int32) // GROUP)
        return
    yield _integers(f"{name}.weight_packed", _words(rng, (rows, columns // 8)))
    yield _halves(f"{name}.weight_scale", _around(rng, scale, (rows, groups)))
    yield Tensor(f"{name}.weight_shape", "I64", (2,), np.array([rows, columns], np.int64).tobytes())


def _fp8(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Signs and mantissas at random, magnitudes from 1/4 to 2."""
    exponent = rng.integers(5, 8, shape, dtype=np.uint8)
    return (rng.integers(0, 2, shape, dtype=np.uint8) << 7) | (exponent << 3) | rng.integers(0, 8, shape, np.uint8)


def _words(rng: np.random.Generator, shape: tuple[int, ...], lowest: int = 0) -> npt.NDArray[np.int32]:
    """Eight numbers of four bits in every word; with `lowest`, each is that or the next two."""
    if not lowest:
        return rng.integers(-(1 << 31), 1 << 31, shape, dtype=np.int64).astype(np.int32)
    nibbles = rng.integers(lowest, lowest + 3, (*shape, 8), dtype=np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return np.asarray((nibbles << shifts).sum(-1, dtype=np.uint32).view(np.int32))


def _around(rng: np.random.Generator, value: float, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.asarray(value * rng.uniform(0.8, 1.2, shape), np.float32)


def _floats(name: str, values: npt.NDArray[np.float32]) -> Tensor:
    return Tensor(name, "F32", values.shape, values.tobytes())


def _halves(name: str, values: npt.NDArray[np.float32]) -> Tensor:
    return Tensor(name, "F16", values.shape, values.astype(np.float16).tobytes())


def _integers(name: str, values: npt.NDArray[np.int32]) -> Tensor:
    return Tensor(name, "I32", values.shape, values.tobytes())
