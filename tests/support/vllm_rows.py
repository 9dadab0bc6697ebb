"""What an engine computes on, expert by expert: digests of stock's weights and of what a sidecar has instead."""

from __future__ import annotations

import hashlib
from typing import Any


def stock_rows(llm: Any) -> dict[str, str]:
    """Digest of every expert's row of a stock engine's expert layers, by name and number.

    A value that a layer has for all its experts counts as everybody's row.
    """
    digests = {}
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
    experts = {
        name: module.local_num_experts for name, module in model.named_modules() if name.endswith(".routed_experts")
    }
    for name, parameter in model.named_parameters():
        owner, _, param = name.rpartition(".")
        if owner not in experts:
            continue
        rows = parameter.data if parameter.dim() else parameter.data.expand(experts[owner])
        for expert, row in enumerate(rows):
            digests[f"{owner.removesuffix('.routed_experts')}.{param} {expert}"] = _digest(row)
    return digests


def _digest(row: Any) -> str:
    import torch

    return hashlib.sha256(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def slot_rows(llm: Any) -> dict[str, str]:
    """The same of what an engine with Expertier holds in slots: only of the experts that are there."""
    runtime = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.expertier
    digests = {}
    for stage in runtime._stages:
        slots = runtime.places.tier.pool.slots(stage.layer)
        for expert in (slots >= 0).nonzero()[0].tolist():
            for row in stage.rows:
                value = getattr(stage.module, row.param).data
                digests[f"{stage.name}.{row.param} {expert}"] = _digest(value[slots[expert]] if row.moves else value)
    return digests


def sidecar_rows(llm: Any) -> dict[str, str]:
    """The same of the sidecar that an engine with Expertier computes on; checksums are verified."""
    from expertier.catalog.pack import read_pack

    pack = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.expertier._pack
    pack = read_pack(pack.path, pack.key)
    digests = {}
    with pack.path.open("rb") as file:
        for name, part in pack.parts.items():
            for expert in range(part.experts):
                file.seek(part.offset + expert * part.stride)
                data = file.read(part.expert_bytes)
                digests[f"{name} {expert}"] = hashlib.sha256(data).hexdigest()
                pack.check(name, expert)(memoryview(data))
    return digests
