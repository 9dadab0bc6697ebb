"""What a trace says about the model it was recorded of."""

from __future__ import annotations

from expertier.catalog.routers import read_routers, routers_digest
from expertier.catalog.types import Catalog
from expertier.config import OffloadOptions
from expertier.residency.windows import WindowPool
from expertier.routing.trace_format import TraceHeader, TraceLayer


def trace_header(
    catalog: Catalog, pool: WindowPool, options: OffloadOptions, *, engine: str, hidden_size: int
) -> TraceHeader:
    """Describe a model and what is recorded of it.

    Parameters
    ----------
    catalog : Catalog
        The model.
    pool : WindowPool
        Its memory, which knows what a load costs.
    options : OffloadOptions
        What is to be recorded.
    engine : str
        Who runs it.
    hidden_size : int
        Width of the routers' inputs.
    """
    return TraceHeader(
        fingerprint=catalog.fingerprint,
        architecture=catalog.architecture,
        model=catalog.path.name,
        engine=engine,
        layers=tuple(
            TraceLayer(
                layer=layer.layer,
                experts=layer.experts,
                top_k=layer.top_k,
                slot_bytes=pool.slot_bytes(layer.layer),
                read_bytes=pool.read_bytes(layer.layer),
                stages=pool.stages(layer.layer),
            )
            for layer in catalog.layers
        ),
        weights=True,
        tokens=options.trace_tokens == "on",
        hidden_size=hidden_size if options.trace_hidden else 0,
        routers=routers_digest(read_routers(catalog), tuple(catalog.by_layer)),
    )
