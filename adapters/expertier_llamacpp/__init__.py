"""Expertier for llama.cpp: ``from expertier_llamacpp import Llama``."""

from expertier_llamacpp.llama import Llama

__all__ = ["Llama"]
