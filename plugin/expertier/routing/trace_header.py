"""What a trace says about the model it was recorded of."""

from __future__ import annotations

from collections.abc import Mapping

from expertier.catalog.routers import Weights, read_routers, routers_digest
from expertier.catalog.types import Catalog
from expertier.residency.windows import WindowPool
from expertier.routing.trace_format import TraceHeader, TraceLayer


def trace_header(
    catalog: Catalog,
    *,
    engine: str,
    pool: WindowPool | None = None,
    weights: bool = False,
    tokens: bool = False,
    hidden_size: int = 0,
    routers: Mapping[int, Weights] | None = None,
) -> TraceHeader:
    """Describe a model and what is recorded of it.

    Parameters
    ----------
    catalog : Catalog
        The model.
    engine : str
        Who runs it.
    pool : WindowPool, optional
        Its memory, which knows what a load costs; without one an expert is what it is on storage, read at once.
    weights, tokens : bool
        Whether gate weights and token ids are recorded.
    hidden_size : int
        Width of the routers' inputs where they are recorded.
    routers : mapping of int to ndarray of float32, shape (experts, hidden), optional
        The model's router weights, if they were read already.
    """
    layers = []
    for layer in catalog.layers:
        number = layer.layer
        layers.append(
            TraceLayer(
                layer=number,
                experts=layer.experts,
                top_k=layer.top_k,
                slot_bytes=pool.slot_bytes(number) if pool else layer.expert_bytes,
                read_bytes=pool.read_bytes(number) if pool else (layer.expert_bytes,),
                stages=pool.stages(number) if pool else len(layer.parts),
            )
        )
    return TraceHeader(
        fingerprint=catalog.fingerprint,
        architecture=catalog.architecture,
        model=catalog.path.name,
        engine=engine,
        layers=tuple(layers),
        weights=weights,
        tokens=tokens,
        hidden_size=hidden_size,
        routers=routers_digest(read_routers(catalog) if routers is None else routers, tuple(catalog.by_layer)),
    )
