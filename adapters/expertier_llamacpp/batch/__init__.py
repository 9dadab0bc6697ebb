"""Many sequences in one llama.cpp context: ``from expertier_llamacpp import BatchEngine``."""

from expertier_llamacpp.batch.engine import BatchEngine
from expertier_llamacpp.batch.requests import Output, Request, Sampling

__all__ = ["BatchEngine", "Output", "Request", "Sampling"]
