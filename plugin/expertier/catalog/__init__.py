"""Where each expert's bytes are: readers for model files and our own sidecar."""

from expertier.catalog.reading import read_catalog

__all__ = ["read_catalog"]
