"""Expertier for llama.cpp: ``from expertier_llamacpp import Llama, BatchEngine``."""

from expertier_llamacpp.batch import BatchEngine
from expertier_llamacpp.llama import Llama

__all__ = ["BatchEngine", "Llama"]
