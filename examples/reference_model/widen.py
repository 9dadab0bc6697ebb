"""Widening: experts become megabytes, and what the model computes stays the same.

An expert computes ``down @ (silu(gate @ x) * (up @ x))``. If each of its intermediate units stands there ``w`` times
and each copy contributes a ``w``-th, the sum is the same; router, attention and embeddings are untouched, hence so are
routing and text. The copies are laid out as repetitions of the whole expert (units 0..n-1, 0..n-1, ...): a
quantisation block then holds as many different values as in a model that was trained at that width, so that
quantising costs what it costs there.

The factor ``1/w`` is shared out: ``up`` takes a power of two near ``sqrt(1/w)`` and ``down`` the rest. All of it in
``down`` would push its weights towards the subnormal numbers of float16, where the scales of quantised blocks, which
are smaller still, lose their digits. If ``w`` is a power of two both factors are exact.
"""

from __future__ import annotations

import math
import re

from expertier.errors import ExpertierError
from reference_model.checkpoint import Checkpoint, FloatArray

PROJECTIONS = ("gate", "up", "down")
# K-quants work on rows of a multiple of this many weights.
_BLOCK = 256
# A power of two is worth being this much off the asked size.
_POWER_OF_TWO_TOLERANCE = 0.06
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class SizeError(ExpertierError, ValueError):
    """The asked model size cannot be read or is below the smallest possible one."""

    __str__ = ExpertierError.__str__


def parse_size(text: str | int) -> int:
    """Return the bytes in ``"1GB"``, ``"4.8 GB"``, ``"900MiB"`` or a plain number.

    Raises
    ------
    SizeError
        It is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise SizeError(f"{text!r} is not a size.", "Write it like 1GB, 4.8GB or 900MiB.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def granule(intermediate_size: int) -> int:
    """Return the smallest factor that makes an intermediate size a multiple of 256, as K-quants need it."""
    return _BLOCK // math.gcd(_BLOCK, intermediate_size)


def choose_factor(size: int, fixed_bytes: int, bytes_per_factor: float, step: int) -> int:
    """Return the factor that brings a model closest to `size`.

    Parameters
    ----------
    size : int
        Wanted bytes of the whole file.
    fixed_bytes : int
        Bytes of everything that is not widened.
    bytes_per_factor : float
        Bytes all experts take at factor 1.
    step : int
        The factor is a multiple of this.

    Raises
    ------
    SizeError
        Even the smallest factor makes a file of more than 1.5 times `size`.
    """
    exact = (size - fixed_bytes) / bytes_per_factor
    smallest = fixed_bytes + step * bytes_per_factor
    if smallest > 1.5 * size:
        raise SizeError(
            f"The smallest widened model is {smallest / 1e6:.0f} MB, more than the {size / 1e6:.0f} MB asked for.",
            f"Ask for at least {math.ceil(smallest / 1e6)}MB, or for no size to get the model as trained.",
        )
    factor = max(step, round(exact / step) * step)
    power = 1 << round(math.log2(factor))
    if power % step == 0 and abs(power - exact) <= _POWER_OF_TWO_TOLERANCE * exact:
        return power
    return factor


def scales(factor: int) -> dict[str, float]:
    """Return what each projection is multiplied with at a widening factor; the product of all is ``1 / factor``."""
    half = 1 << (factor.bit_length() // 2) if factor > 1 else 1
    return {"gate": 1.0, "up": 1.0 / half, "down": half / factor}


def widen_axis(projection: str) -> int:
    """Return which axis of a projection's matrix counts intermediate units."""
    return 1 if projection == "down" else 0


def scaled_expert(checkpoint: Checkpoint, layer: int, expert: int, projection: str, factor: int) -> FloatArray:
    """Return one expert's matrix, scaled for `factor` but not repeated yet, as float32."""
    scaled: FloatArray = checkpoint.expert(layer, expert, projection) * scales(factor)[projection]
    return scaled.astype("float32", copy=False)
