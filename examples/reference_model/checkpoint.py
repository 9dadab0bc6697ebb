"""Reading a small checkpoint: the trained base that everything else is derived from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from expertier.errors import ModelFormatError, ModelNotFoundError
from reference_model.config import ReferenceConfig

FloatArray = NDArray[np.float32]


class Checkpoint:
    """A Hugging Face folder of the reference architecture, read lazily.

    Parameters
    ----------
    folder : Path
        Holds ``config.json``, ``model.safetensors`` (or shards of it) and ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = ReferenceConfig.from_hf(folder)
        self.tokenizer_path = folder / "tokenizer.json"
        shards = sorted(folder.glob("model*.safetensors"))
        if not shards or not self.tokenizer_path.is_file():
            raise ModelNotFoundError(
                f"{folder} lacks model.safetensors or tokenizer.json.", "Name a Hugging Face folder."
            )
        try:
            # Through torch: numpy has no bfloat16.
            self._files: list[Any] = [safe_open(str(shard), framework="pt") for shard in shards]
        except SafetensorError as error:
            raise ModelFormatError(f"{folder} holds a damaged safetensors file: {error}.") from error
        self._where = {name: file for file in self._files for name in list(file.keys())}

    def tensor(self, name: str) -> FloatArray:
        """Return one tensor as float32.

        Raises
        ------
        ModelFormatError
            The checkpoint lacks it.
        """
        if name not in self._where:
            raise ModelFormatError(f"{self.folder} lacks the tensor {name}.")
        array: FloatArray = self._where[name].get_tensor(name).float().numpy()
        return array

    def expert(self, layer: int, expert: int, projection: str) -> FloatArray:
        """Return one of an expert's matrices; `projection` is ``gate``, ``up`` or ``down``."""
        return self.tensor(f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight")
