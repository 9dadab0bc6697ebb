"""One expert at a time through vLLM's own loading: the stage of a layer, and what comes out of it."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from expertier.catalog.types import ExpertPart, PartRole
from expertier.errors import ModelFormatError, UnsupportedModelError
from expertier.residency.pages import PAGE
from expertier_vllm import refusals
from expertier_vllm.checkpoint import CheckpointFiles, Source, SourceReader, tensor_at
from expertier_vllm.row_fill import Row, RowFill

if TYPE_CHECKING:
    from expertier_vllm.stand_ins import RouterScoring

_NUMBER: Final = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class Loader(Protocol):
    """What a layer tells of its loading, and learns about it.

    Attributes
    ----------
    in_slots : bool
        Whether its experts will be in slots.
    """

    in_slots: bool

    def sources(self) -> CheckpointFiles | None:
        """Where to look checkpoint tensors up; ``None`` when an earlier start has left a sidecar."""

    def loaded(self, stage: ExpertStage) -> None:
        """Note that a layer's weights have been handed out."""


class Computation(Protocol):
    """What computes a layer's experts; see :class:`expertier_vllm.forward.ForwardPass`."""

    def choose(
        self, stage: ExpertStage, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let resident experts stand in."""

    def run(self, stage: ExpertStage, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute, after bringing in what is absent."""


class ExpertStage:
    """A layer's place in the offload manager, and its one-expert stage while it loads.

    The layer's weights are created for one expert, see :class:`~expertier_vllm.row_fill.RowFill`. Here is noted where
    the checkpoint has every expert's tensors, and from here the sidecar gets every expert's rows.

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
        Place among the MoE layers of this worker, known when all are loaded.
    experts, top_k : int
        Of the layer.
    tokens : int or None
        Of the whole step, while the layer computes it in groups.
    rows : tuple of Row
        What an expert consists of; empty until :meth:`set_up`.
    spacing : int
        Expert ``e`` goes by the number ``e * spacing`` in the layer's weights; see
        :attr:`expertier.residency.windows.WindowPool.spacing`.
    """

    def __init__(self, module: Any, name: str) -> None:
        numbers = _NUMBER.findall(name)
        if not numbers:
            raise UnsupportedModelError(f"The expert layer {name} has no number.", "Start without Expertier.")
        self.module = module
        self.name = name
        self.layer = int(numbers[0])
        self.position = -1
        self.top_k = 0
        self.spacing = 1
        self.tokens: int | None = None
        self.rows: tuple[Row, ...] = ()
        self.loader: Loader
        self.forward: Computation
        self.scoring: RouterScoring  # where virtual experts are on
        self._sources: dict[int, list[Source]] = {}
        self._fill: RowFill
        self._method: Any = None

    # ---- construction

    def adopt(self, method: Any) -> None:
        """Make a quantisation method create weights for one expert, and report to us when they are loaded.

        Raises
        ------
        UnsupportedModelError
            As for :class:`~expertier_vllm.row_fill.RowFill`.
        """
        self._fill = RowFill(self.module, method, lambda: self.loader.loaded(self))
        self._method = method

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return self._fill.experts

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self._fill.device

    @property
    def format(self) -> str:
        """How the experts are quantised, in words."""
        return self._fill.format.name

    @property
    def filling(self) -> bool:
        """Whether the layer's ``weight_loader`` is stock's at the moment."""
        return self._fill.filling

    @property
    def method(self) -> Any:
        """The layer's quantisation method."""
        return self._method

    # ---- loading

    def remember(self, param: torch.nn.Parameter, tensor: torch.Tensor, name: str, shard: str, expert: int) -> None:
        """Note where a checkpoint tensor of an expert lies, unless the sidecar has it already."""
        self._fill.saw(name)
        files = self.loader.sources()
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
            param=self._fill.param_of(param),
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
        """Find out what an expert consists of once it has been processed; see :meth:`RowFill.rows`."""
        self.rows = self._fill.rows(in_slots=self.loader.in_slots)

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
        fill = self._fill
        small: dict[Row, list[bytes]] = {row: [] for row in self.rows if row.small}
        try:
            fill.gather(self._sources.values(), reader)
            for row in self.rows:
                family = _family(row.param)
                if small.get(row):
                    yield from (memoryview(data) for data in small[row])
                    continue
                # Small rows are kept from the first time that their family is read. Large ones are not: the reading of
                # a layer is repeated for each, rather than all its experts held in memory.
                unread = [other for other, rows in small.items() if not rows and _family(other.param) == family]
                for expert in range(self.experts):
                    mine = [source for source in self._sources[expert] if _family(source.param) == family]
                    fill.fill(mine, reader)
                    for other in unread:
                        small[other].append(bytes(fill.bytes_of(other)))
                    if not row.small:
                        yield fill.bytes_of(row)
                if row.small:
                    yield from (memoryview(data) for data in small[row])
        finally:
            fill.clear()

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

    def settle(self, addresses: Mapping[str, int], resident: Mapping[str, torch.Tensor]) -> None:
        """End loading: put the windows, and the rows that stay resident, where the layer's weights belong.

        Parameters
        ----------
        addresses : mapping of str to int
            Part name to the address of expert 0.
        resident : mapping of str to Tensor
            Part name to the rows of all experts.
        """
        self._sources.clear()
        values = {}
        for row in self.rows:
            name = f"{self.name}.{row.param}"
            shape = (self.experts * self.spacing, *row.shape)
            if row.moves:
                values[row] = tensor_at(addresses[name], shape, row.dtype)
            elif row.common:
                values[row] = resident[name][0].clone()
            elif self.spacing == 1:
                values[row] = resident[name]
            else:  # zeros cost no memory before they are touched
                values[row] = torch.zeros(shape, dtype=row.dtype)
                values[row][:: self.spacing] = resident[name]
        self._fill.settle(values)

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay resident for all experts, at most."""
        common = sum(row.nbytes for row in self.rows if row.common)
        rows = [row.nbytes for row in self.rows if not row.moves and not row.common]
        return common + self.experts * sum(min(self.spacing * size, size + 2 * PAGE) for size in rows)

    def settle_in_slots(self, slots: Mapping[str, torch.Tensor], resident: Mapping[str, torch.Tensor]) -> None:
        """End loading: let the layer's weights be slots, and what it has one value of be that.

        Parameters
        ----------
        slots : mapping of str to Tensor
            Part name to the rows of all slots, shape ``(slots, ...)``.
        resident : mapping of str to Tensor
            Part name to the rows of all experts, of what does not come and go.
        """
        self._sources.clear()
        values = {}
        for row in self.rows:
            name = f"{self.name}.{row.param}"
            values[row] = slots[name] if row.moves else resident[name][0].clone().to(self.device)
        self._fill.settle(values)
        self.module.global_num_experts = len(next(iter(slots.values())))

    def choose(
        self, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let resident experts stand in; see :meth:`expertier_vllm.forward.ForwardPass.choose`."""
        return self.forward.choose(self, logits, weights, ids)

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute the layer's experts; see :meth:`expertier_vllm.forward.ForwardPass.run`."""
        return self.forward.run(self, x, weights, ids)


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
