"""One expert at a time through vLLM's own loading: the stage of a layer, and what comes out of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from expertier.catalog.types import ExpertPart, PartRole
from expertier.errors import ModelFormatError, UnsupportedModelError
from expertier.residency.pages import PAGE
from expertier_vllm import refusals
from expertier_vllm.checkpoint import CheckpointFiles, Source, SourceReader, tensor_at

if TYPE_CHECKING:
    from expertier_vllm.runtime import Runtime
    from expertier_vllm.stand_ins import RouterScoring

_SMALL: Final = 8  # rows below this fraction of an expert stay resident for all experts
# Upstream: unquantized_fused_moe_method.py. No other method runs on the processors this was tested on.
_VERIFIED_METHODS: Final = frozenset({"UnquantizedFusedMoEMethod"})
_NUMBER: Final = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


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
    window : bool
        Whether it comes and goes with its expert; small rows stay resident for all experts.
    """

    param: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    window: bool

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's row."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


class ExpertStage:
    """A layer's place in the offload manager, and its one-expert stage while it loads.

    The layer's weights are created for one expert. Checkpoint tensors of an expert are put into them by vLLM's own
    ``weight_loader``, vLLM's own post-processing rearranges them, and the result is that expert's row of what stock
    would hold for all of them.

    Parameters
    ----------
    module : object
        The expert layer.
    name : str
        Its name in the model.

    Attributes
    ----------
    layer : int
        Index of the transformer layer.
    position : int
        Place among the MoE layers of this worker, set by the runtime.
    experts, top_k : int
        Of the layer.
    filling : bool
        Whether the layer's ``weight_loader`` is stock's at the moment.
    rows : tuple of Row
        What an expert consists of; empty until :meth:`set_up`.
    """

    def __init__(self, module: Any, name: str) -> None:
        numbers = _NUMBER.findall(name)
        if not numbers:
            raise UnsupportedModelError(f"The expert layer {name} has no number.", "Start without Expertier.")
        self.module = module
        self.name = name
        self.layer = int(numbers[0])
        self.position = -1
        self.experts = self.top_k = 0
        self.filling = False
        self.rows: tuple[Row, ...] = ()
        self.runtime: Runtime
        self.scoring: RouterScoring  # where virtual experts are on
        self._sources: dict[int, list[Source]] = {}
        self._creation: dict[str, Any] = {}
        self._method: Any = None
        self._create: Callable[..., None]
        self._process: Callable[[Any], None]

    # ---- construction

    def adopt(self, method: Any) -> None:
        """Make a quantisation method create weights for one expert, and report to us when they are loaded.

        Upstream: ``RoutedExperts.__init__`` calls ``create_weights``, ``process_weights_after_loading`` of
        model_loader/utils.py the method's of the same name.

        Raises
        ------
        UnsupportedModelError
            The method was never seen to compute right on experts that come and go.
        """
        if type(method).__name__ not in _VERIFIED_METHODS:
            raise refusals.unverified_quantisation(type(method).__name__)
        self._method = method
        self._create, self._process = method.create_weights, method.process_weights_after_loading

        def create_weights(layer: Any, num_experts: int, **arguments: Any) -> None:
            self.experts = num_experts
            self._creation = arguments
            self._create(layer=layer, num_experts=1, **arguments)

        def process_weights_after_loading(layer: Any) -> None:
            self.runtime.loaded(self)

        method.create_weights = create_weights
        method.process_weights_after_loading = process_weights_after_loading

    @property
    def method(self) -> Any:
        """The layer's quantisation method."""
        return self._method

    # ---- loading

    def remember(self, param: torch.nn.Parameter, tensor: torch.Tensor, name: str, shard: str, expert: int) -> None:
        """Note where a checkpoint tensor of an expert lies, unless the sidecar has it already."""
        files = self.runtime.sources()
        if files is None:
            return
        if tensor.dim() == param.dim() == 3:  # some models pass all experts at once
            for index, piece in enumerate(tensor.unbind()):
                self._note(files, param, piece, name, shard, index)
        else:
            self._note(files, param, tensor, name, shard, expert)

    def _note(
        self,
        files: CheckpointFiles,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> None:
        place = files.locate(tensor)
        if place is None:
            raise refusals.not_on_storage(name)
        source = Source(
            param=next(key for key, value in self.module.named_parameters() if value is param),
            shard=shard,
            name=name,
            file=place[0],
            offset=place[1],
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            dtype=tensor.dtype,
        )
        self._sources.setdefault(expert, []).append(source)

    def set_up(self) -> None:
        """Find out what an expert consists of once it has been processed; keeps nothing of the weights."""
        self._run_once()
        if self.method.is_monolithic:
            raise refusals.monolithic_backend(type(self.method).__name__)
        parameters = dict(self.module.named_parameters())
        total = sum(value.nbytes for value in parameters.values())
        rows = []
        for name, value in parameters.items():
            if value.dim() < 2 or value.shape[0] != 1 or not value.is_contiguous():
                raise refusals.unverified_quantisation(type(self.method).__name__)
            window = value.nbytes * _SMALL >= total
            if window and value.nbytes % PAGE:
                raise refusals.shared_pages(name, value.nbytes, PAGE)
            rows.append(Row(param=name, shape=tuple(value.shape[1:]), dtype=value.dtype, window=window))
        self.rows = tuple(sorted(rows, key=lambda row: (not row.window, row.param.startswith("w2"))))
        self._clear()

    def _run_once(self) -> None:
        """Leave the layer as stock's processing leaves it, with one expert of zeros."""
        self._reset()
        for value in self.module.parameters():
            value.data.zero_()
        self._process(self.module)

    def _clear(self) -> None:
        for name in [name for name, _ in self.module.named_parameters()]:
            delattr(self.module, name)

    def _reset(self) -> None:
        """Give the layer unprocessed weights for one expert again."""
        self._clear()
        self._method.moe_kernel = None  # upstream rearranges only the first time
        self._create(layer=self.module, num_experts=1, **self._creation)

    # ---- writing the sidecar

    def parts(self) -> list[ExpertPart]:
        """The rows of all experts, as parts of a sidecar; file and offset are chosen when it is written."""
        return [
            ExpertPart(
                name=f"{self.name}.{row.param}",
                layer=self.layer,
                role=_role(row.param),
                file=Path(),
                offset=0,
                expert_bytes=row.nbytes,
                experts=self.experts,
                type_name=str(row.dtype).removeprefix("torch."),
                shape=(*reversed(row.shape), self.experts),
            )
            for row in self.rows
        ]

    def row(self, part: str) -> Row:
        """Return the row of which a part holds all experts'."""
        return next(row for row in self.rows if part == f"{self.name}.{row.param}")

    def produce(self, reader: SourceReader) -> Generator[memoryview, None, None]:
        """Yield every expert's rows, part by part, in the order of :meth:`parts`.

        Raises
        ------
        ModelFormatError
            The checkpoint lacks tensors of an expert.
        """
        self._check_complete()
        small: dict[str, list[bytes]] = {row.param: [] for row in self.rows if not row.window}
        try:
            for row in self.rows:
                if not row.window and small[row.param]:
                    yield from (memoryview(data) for data in small[row.param])
                    continue
                for expert in range(self.experts):
                    self._fill(expert, _family(row.param), reader)
                    for name, rows in small.items():
                        if _family(name) == _family(row.param):
                            rows.append(bytes(_bytes_of(getattr(self.module, name))))
                    yield _bytes_of(getattr(self.module, row.param))
        finally:
            self._clear()

    def _fill(self, expert: int, family: str, reader: SourceReader) -> None:
        """Bring the tensors of one expert whose names begin with `family` through vLLM's loading."""
        self._reset()
        self.filling = True
        try:
            for source in self._sources[expert]:
                if _family(source.param) == family:
                    self.module.weight_loader(
                        getattr(self.module, source.param), reader.read(source), source.name, source.shard, expert, True
                    )
        finally:
            self.filling = False
        self._process(self.module)

    def _check_complete(self) -> None:
        expected = {(source.param, source.shard) for sources in self._sources.values() for source in sources}
        for expert in range(self.experts):
            missing = expected - {(source.param, source.shard) for source in self._sources.get(expert, ())}
            if missing or not expected:
                what = ", ".join(sorted(" ".join(pair) for pair in missing)) or "all tensors"
                raise ModelFormatError(
                    f"The checkpoint lacks {what} of expert {expert} in {self.name}.",
                    "Fetch it again, or complete its shards.",
                )

    # ---- serving

    def settle(self, addresses: dict[str, int], resident: dict[str, torch.Tensor]) -> None:
        """End loading: put the windows, and the rows that stay resident, where the layer's weights belong.

        Parameters
        ----------
        addresses : dict of str to int
            Part name to the address of expert 0.
        resident : dict of str to Tensor
            Part name to the rows of all experts.
        """
        self._sources.clear()
        self._run_once()
        for row in self.rows:
            name = f"{self.name}.{row.param}"
            if row.window:
                # Not a parameter: whoever walks over those (checksums, sleep mode, saving) would touch absent experts.
                delattr(self.module, row.param)
                window = tensor_at(addresses[name], (self.experts, *row.shape), row.dtype)
                self.module.__dict__[row.param] = window
            else:
                # The same Parameter object: upstream's kernel keeps the one it was built with.
                getattr(self.module, row.param).data = resident[name]

    def choose(
        self, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let resident experts stand in; see :meth:`expertier_vllm.runtime.Runtime.choose`."""
        return self.runtime.choose(self, logits, weights, ids)

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute the layer's experts; see :meth:`expertier_vllm.runtime.Runtime.run`."""
        return self.runtime.run(self, x, weights, ids)


def layers_in_order(stages: Sequence[ExpertStage]) -> list[ExpertStage]:
    """Sort stages by layer and number them.

    Raises
    ------
    UnsupportedModelError
        Two expert layers belong to the same transformer layer.
    """
    ordered = sorted(stages, key=lambda stage: stage.layer)
    for position, stage in enumerate(ordered):
        if position and ordered[position - 1].layer == stage.layer:
            raise UnsupportedModelError(
                f"{stage.name} and {ordered[position - 1].name} belong to one layer.", "Start without Expertier."
            )
        stage.position = position
    return ordered


def _family(param: str) -> str:
    """``w13`` or ``w2``: parameters of one family are processed together."""
    return param.partition("_")[0]


def _role(param: str) -> PartRole:
    return "down" if _family(param) == "w2" else "gate_up"


def _bytes_of(parameter: torch.Tensor) -> memoryview:
    return memoryview(parameter.data.view(torch.uint8).numpy().reshape(-1))
