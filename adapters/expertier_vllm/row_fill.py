"""An expert layer with room for one expert: vLLM's own loading and processing fill it, whatever the format.

What comes out is that expert's row of what stock would hold for all of them: weights, scales, zero points, biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from expertier_vllm import refusals
from expertier_vllm.checkpoint import Source, SourceReader
from expertier_vllm.formats import FORMATS, KERNELS, SLOT_KERNELS, ExpertFormat
from expertier_vllm.kernels import check_kernel

_SMALL: Final = 64  # rows below this fraction of an expert are small


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one expert holds of one of a layer's tensors, after vLLM has processed it.

    Attributes
    ----------
    param : str
        Attribute of the layer, e.g. ``w13_weight``.
    shape : tuple of int
        Without the expert dimension.
    dtype : torch.dtype
        Element type.
    moves : bool
        Whether it comes and goes with its expert: in slots every row does, in windows small ones stay resident for all
        experts.
    small : bool
        Whether all experts' rows together are a small part of the layer.
    common : bool
        Whether the layer holds one value for all experts, which stays; every expert's row then repeats it.
    """

    param: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    moves: bool
    small: bool = False
    common: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's row."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


class RowFill:
    """A layer's weights for one expert.

    Parameters
    ----------
    module : object
        The expert layer.
    method : object
        Its quantisation method. From now on it creates weights for one expert.
    loaded : callable
        Called when vLLM would process the layer's weights, all of which have been handed out by then.

    Attributes
    ----------
    experts : int
        That the layer is to have; known once its weights have been created.
    filling : bool
        Whether the layer's ``weight_loader`` is stock's at the moment.
    device : torch.device
        Where the layer computes; known with `experts`.

    Raises
    ------
    UnsupportedModelError
        Nobody has compared what the method makes of an expert with what stock holds.

    Notes
    -----
    Upstream: ``RoutedExperts.__init__`` calls ``create_weights``, ``process_weights_after_loading`` of
    model_loader/utils.py the method's of the same name.
    """

    def __init__(self, module: Any, method: Any, loaded: Callable[[], None]) -> None:
        known = FORMATS.get(type(method).__name__)
        if known is None:
            raise refusals.unverified_quantisation(type(method).__name__)
        self.format: ExpertFormat = known
        self.experts = 0
        self.filling = False
        self.device = torch.device("cpu")
        self._module, self._method = module, method
        self._creation: dict[str, Any] = {}
        self._create: Callable[..., None] = method.create_weights
        self._process: Callable[[Any], None] = method.process_weights_after_loading
        self._common: dict[str, torch.Tensor] = {}

        def create_weights(layer: Any, num_experts: int, **arguments: Any) -> None:
            self.experts = num_experts
            self._creation = arguments
            self._create(layer=layer, num_experts=1, **arguments)
            self.device = next(layer.parameters()).device  # upstream: models are constructed under the device

        method.create_weights = create_weights
        method.process_weights_after_loading = lambda layer: loaded()

    def saw(self, name: str) -> None:
        """Note the name under which a tensor was offered.

        Upstream: ``RoutedExperts._loaded_expert_biases``; a method that reserves room for biases drops it if none came.
        """
        if "bias" in name:
            self._module._loaded_expert_biases.add(name.rsplit(".", 1)[-1])

    def param_of(self, parameter: torch.nn.Parameter) -> str:
        """Name of one of the layer's parameters."""
        return str(next(name for name, value in self._module.named_parameters() if value is parameter))

    # ---- what comes out

    def rows(self, *, in_slots: bool = False) -> tuple[Row, ...]:
        """Find out what an expert consists of once it has been processed; keeps nothing of the weights.

        Parameters
        ----------
        in_slots : bool
            Whether the kernel is to compute on slots.

        Raises
        ------
        UnsupportedOptionError
            The kernel for it routes inside.
        UnsupportedModelError
            Some of it belongs to no single expert, the kernel is not known, or it would not see what is put in place
            of the layer's weights.
        """
        self.process_nothing()
        kind = type(self._method).__name__
        if self._method.is_monolithic:
            raise refusals.monolithic_backend(kind)
        kernel = getattr(self._method, "experts_cls", None)
        known = KERNELS | SLOT_KERNELS if in_slots else KERNELS
        if kernel is not None and kernel.__name__ not in known:
            raise refusals.unverified_kernel(kernel.__name__, self.format.on_device)
        parameters = dict(self._module.named_parameters())
        check_kernel(self._method.moe_kernel, parameters.values(), in_slots=in_slots)
        total = sum(value.nbytes for value in parameters.values())
        rows = []
        for name, value in parameters.items():
            common = value.dim() == 0 and name in self.format.over_experts
            own = value.dim() > 0 and value.shape[0] == 1 and value.numel() > 0 and value.is_contiguous()
            if not common and not own:
                raise refusals.unverified_quantisation(kind)
            small = common or value.nbytes * _SMALL < total
            rows.append(
                Row(
                    param=name,
                    shape=tuple(value.shape[1:]),
                    dtype=value.dtype,
                    moves=not common and (in_slots or not small),
                    small=small,
                    common=common,
                )
            )
        self.clear()
        return tuple(sorted(rows, key=lambda row: (row.small, row.param.startswith("w2"))))

    def process_nothing(self) -> None:
        """Leave the layer as stock's processing leaves it, with one expert of zeros."""
        self._reset()
        for value in self._module.parameters():
            value.data.zero_()
        with self._alone():
            self._process(self._module)

    def gather(self, sources: Iterable[Iterable[Source]], reader: SourceReader) -> None:
        """Take note of the values that the layer replaces by the largest among its experts.

        Parameters
        ----------
        sources : iterable
            For every expert, its tensors.
        reader : SourceReader
            Reads them.
        """
        wanted = self.format.over_experts
        self._common.clear()
        for tensors in sources:
            mine = [source for source in tensors if source.param in wanted]
            if not mine:
                continue
            self._reset()
            self._load(mine, reader)
            for param in {source.param for source in mine}:
                value = getattr(self._module, param).data
                largest = self._common.setdefault(param, value.clone())
                torch.maximum(largest, value, out=largest)

    def fill(self, sources: Iterable[Source], reader: SourceReader) -> None:
        """Bring tensors of one expert through vLLM's loading and processing."""
        self._reset()
        self._load(sources, reader)
        for param, largest in self._common.items():
            getattr(self._module, param).data.copy_(largest)
        with self._alone():
            self._process(self._module)

    def bytes_of(self, row: Row) -> memoryview:
        """The bytes of a row of the expert that was filled in last; valid until the next one."""
        value = getattr(self._module, row.param).data
        return memoryview(value.reshape(-1).view(torch.uint8).cpu().numpy())

    def clear(self) -> None:
        """Drop the layer's parameters, under all their names."""
        for name in [name for name, value in self._module._parameters.items() if value is not None]:
            delattr(self._module, name)

    def _load(self, sources: Iterable[Source], reader: SourceReader) -> None:
        self.filling = True
        try:
            for source in sources:
                self._module.weight_loader(
                    getattr(self._module, source.param), reader.read(source), source.name, source.shard, 0, True
                )
        finally:
            self.filling = False

    def _reset(self) -> None:
        """Give the layer unprocessed weights for one expert again."""
        self.clear()
        self._method.moe_kernel = None  # upstream rearranges only the first time
        with self.device:
            self._create(layer=self._module, num_experts=1, **self._creation)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the layer say that it has one expert; some methods process as many as it says."""
        experts = self._module.local_num_experts
        self._module.local_num_experts = 1
        try:
            yield
        finally:
            self._module.local_num_experts = experts

    # ---- serving

    def settle(self, values: Mapping[Row, torch.Tensor]) -> None:
        """Put what a kernel is to compute on where the layer's weights belong.

        Parameters
        ----------
        values : mapping of Row to Tensor
            For every row the tensor of all experts, or the layer's value.
        """
        self.process_nothing()
        module = self._module
        for row, tensor in values.items():
            # The same Parameter object: upstream's kernel keeps the one it was built with. A layer may have two names
            # for it.
            parameter = getattr(module, row.param)
            parameter.data = tensor
            if row.moves:
                # Not a parameter: whoever walks over those (checksums, sleep mode, saving) would touch absent experts.
                for name in [name for name, value in module._parameters.items() if value is parameter]:
                    delattr(module, name)
                    module.__dict__[name] = parameter
