"""What the configuration of a Hugging Face checkpoint says about experts; every family has words of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from expertier.catalog.safetensors_header import CONFIG_NAME, CheckpointLayout
from expertier.errors import ModelFormatError

CHECK_FILES: Final = "Fetch the checkpoint again; if it stays so, it is of a kind that is not known here."

# Where configurations of models that are more than a language model keep the language model's.
_NESTED: Final = ("text_config", "llm_config", "language_config")
_LAYER_KEYS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERT_KEYS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_TOP_K_KEYS: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
# Layers behind the last one that guess several tokens ahead; engines leave them out unless asked to speculate.
_DRAFT_KEYS: Final = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")


class CheckpointConfig:
    """What ``config.json`` says about layers and experts, whatever the family calls it.

    Parameters
    ----------
    layout : CheckpointLayout
        The checkpoint.

    Attributes
    ----------
    path : Path
        The configuration file.
    architecture : str
        Model type, or else the first architecture.
    block_count, draft_layers : int
        Transformer layers, and those for multi-token prediction behind them.
    experts : tuple of (str, object)
        The key that states the number of experts, and its value (``None`` if there is none).
    quant_method : str
        How weights are quantised, empty if they are not.

    Raises
    ------
    ModelFormatError
        The configuration names no architecture or no number of layers.
    """

    def __init__(self, layout: CheckpointLayout) -> None:
        self.path = layout.directory / CONFIG_NAME
        whole = layout.config
        thinker = whole.get("thinker_config")
        outer = [thinker, whole] if isinstance(thinker, dict) else [whole]
        inner = [node.get(name) for node in outer for name in _NESTED]
        self.nodes: list[Mapping[str, Any]] = [node for node in inner if isinstance(node, dict)] + outer
        names = [whole.get("model_type"), *_as_list(whole.get("architectures"))]
        named = next((name for name in names if isinstance(name, str) and name), None)
        if named is None:
            raise ModelFormatError(f"{self.path} does not name its architecture (key model_type).", CHECK_FILES)
        self.architecture = named
        self.experts = self._first(_EXPERT_KEYS)
        self.top_k = self._first(_TOP_K_KEYS)
        block_count = self._first(_LAYER_KEYS)[1]
        if type(block_count) is not int or block_count < 1:
            raise ModelFormatError(
                f"{self.path} does not say how many layers there are ({_LAYER_KEYS[0]}).", CHECK_FILES
            )
        self.block_count = block_count
        drafts = self._first(_DRAFT_KEYS)[1]
        self.draft_layers = drafts if type(drafts) is int and drafts > 0 else 0
        quantised = self._first(("quantization_config",))[1]
        method = [quantised.get(key) for key in ("quant_algo", "quant_method")] if isinstance(quantised, dict) else []
        self.quant_method = next((name for name in method if isinstance(name, str) and name), "")

    def _first(self, keys: Sequence[str]) -> tuple[str, Any]:
        """Return the first of some keys that any node has, with its value."""
        for node in self.nodes:
            for key in keys:
                if node.get(key) is not None:
                    return key, node[key]
        return keys[0], None

    def top_k_of(self, layer: int, experts: int) -> int:
        """Return the experts per token, which may be given once or once per layer.

        Raises
        ------
        ModelFormatError
            They are missing, or no number from 1 to `experts`.
        """
        key, value = self.top_k
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else None
        if type(value) is not int or not 1 <= value <= experts:
            raise ModelFormatError(
                f"{self.path}: layer {layer} has {experts} experts, but {key} is {value!r:.100}.", CHECK_FILES
            )
        return value

    def check_experts(self, layer: int, experts: int) -> None:
        """Compare the number of experts found with the one stated, where one is stated for all layers.

        Raises
        ------
        ModelFormatError
            They differ.
        """
        key, value = self.experts
        if type(value) is int and value != experts:
            raise ModelFormatError(
                f"{self.path}: layer {layer} has {experts} experts, but {key} is {value}.", CHECK_FILES
            )


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
