"""One entrance for models of every format."""

from __future__ import annotations

import os
from pathlib import Path

from expertier.catalog.files import opened
from expertier.catalog.gguf import read_gguf
from expertier.catalog.safetensors import read_safetensors
from expertier.catalog.safetensors_header import CONFIG_NAME, NAME_THE_DIRECTORY, OTHER_WEIGHTS
from expertier.catalog.types import Catalog
from expertier.errors import ModelNotFoundError


def read_catalog(path: str | os.PathLike[str]) -> Catalog:
    """Find every routed expert of a model, whatever its format; the content decides, not the name.

    Parameters
    ----------
    path : path
        A GGUF file (of a split model the first one), or the directory of a Hugging Face checkpoint (or its
        ``config.json``, its index or a weight file in it).

    Returns
    -------
    Catalog
        Experts by layer.

    Raises
    ------
    ModelNotFoundError
        The model, or a file that belongs to it, is missing or cannot be read.
    ModelFormatError
        A file is neither GGUF nor safetensors, damaged or truncated.
    NotMoEError
        The model has no routed experts.
    UnsupportedModelError
        Its experts are stored in a way that cannot be managed.
    """
    return read_safetensors(path) if _is_checkpoint(Path(path)) else read_gguf(path)


def _is_checkpoint(path: Path) -> bool:
    """Whether a path should be read as a checkpoint: a directory with one in it, or a file of one."""
    try:
        if path.is_dir():
            inside = os.listdir(path)
            marks = (CONFIG_NAME, ".safetensors", *OTHER_WEIGHTS)
            return any(name.endswith(marks) for name in inside) or not any(name.endswith(".gguf") for name in inside)
        if not path.exists():
            return path.suffix != ".gguf"
        with opened(path, NAME_THE_DIRECTORY) as (descriptor, _):
            start = os.pread(descriptor, 9, 0)
    except (ModelNotFoundError, OSError, ValueError):
        return False
    # A JSON file, or the length of a header and its first character.
    return start[:1] == b"{" or start[4:] == b"\0\0\0\0{"
