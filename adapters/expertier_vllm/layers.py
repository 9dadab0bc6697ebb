"""The expert layers of one worker while its model loads, until the bytes of their experts are in a sidecar."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from expertier.catalog.pack import Pack, PackKey, find_or_build
from expertier.catalog.safetensors import build_catalog, content_digest, read_layout
from expertier.catalog.sidecar import sidecar_directories
from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.config import OffloadOptions
from expertier.errors import ExpertierError, ModelFormatError, UnsupportedModelError
from expertier.storage import StorageFile
from expertier_vllm.checkpoint import CheckpointFiles, SourceReader
from expertier_vllm.loading import announce, find_sidecar, read_rows, sidecar_name
from expertier_vllm.stage import ExpertStage, layers_in_order


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What a runtime knows of the worker it lives in.

    Attributes
    ----------
    checkpoint : Path
        Directory of the checkpoint.
    rank : int
        Of the worker, in the whole server.
    local_workers : int
        Workers on this machine, which share its memory.
    in_step : bool
        Whether other workers wait for this one, in every layer or after the last.
    shard : str
        Names the worker's part of every layer, e.g. ``tp 0 of 2``.
    library : str
        Engine and version, e.g. ``vllm 0.32.0``.
    device : str
        Type of the device on which layers compute. On any but ``cpu`` experts are in slots.
    """

    checkpoint: Path
    rank: int
    local_workers: int
    in_step: bool
    shard: str
    library: str
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class LoadedExperts:
    """The experts of one worker as they are on storage.

    Attributes
    ----------
    stages : tuple of ExpertStage
        The layers, in order.
    layers : tuple of LayerExperts
        For each, what comes and goes with its experts.
    staying : tuple of tuple of ExpertPart
        For each, what stays for all of them.
    pack : Pack
        The sidecar.
    file : StorageFile
        The same, opened.
    """

    stages: tuple[ExpertStage, ...]
    layers: tuple[LayerExperts, ...]
    staying: tuple[tuple[ExpertPart, ...], ...]
    pack: Pack
    file: StorageFile

    @property
    def always(self) -> int:
        """Bytes of what stays."""
        return sum(stage.resident_bytes for stage in self.stages)

    def resident(self) -> Iterator[dict[str, torch.Tensor]]:
        """Read what stays, layer by layer: the rows of all experts by part name.

        Raises
        ------
        SidecarError, ExpertLoadError
            As :func:`expertier_vllm.loading.read_rows`.
        """
        for stage, parts in zip(self.stages, self.staying, strict=True):
            yield {part.name: read_rows(self.file, self.pack, part, stage.row(part.name).dtype) for part in parts}


class LoadingLayers:
    """Expert layers of a model that is being built and loaded; fulfils :class:`expertier_vllm.stage.Loader`.

    Parameters
    ----------
    facts : WorkerFacts
        Where this is.
    options : OffloadOptions
        Where sidecars lie and how files are read.
    in_slots : bool
        Whether experts will be in slots over host memory, and not in windows of address space.
    complete : callable
        Called with all experts when the last layer has its weights.

    Attributes
    ----------
    catalog : Catalog
        Of the checkpoint.
    files : CheckpointFiles
        The checkpoint, while it loads.
    stages : list of ExpertStage
        The layers: as they were added, and in order once all are loaded.
    in_slots : bool
        As given.

    Notes
    -----
    Life: layers are added while the model is built; :meth:`sources` decides at the first weight whether a sidecar is
    there; :meth:`loaded` is called for every layer, and the last one completes the experts.
    """

    def __init__(
        self,
        facts: WorkerFacts,
        options: OffloadOptions,
        *,
        in_slots: bool,
        complete: Callable[[LoadedExperts], None],
    ) -> None:
        self.in_slots = in_slots
        self._facts = facts
        self._options = options
        self._layout = read_layout(facts.checkpoint)
        self.catalog = build_catalog(self._layout)
        self.files = CheckpointFiles(self._layout, self.catalog)
        self.stages: list[ExpertStage] = []
        self._complete = complete
        self._waiting: set[str] = set()
        self._looked = False
        self._pack: Pack | None = None

    @property
    def directories(self) -> list[Path]:
        """Where files beside the checkpoint are looked for."""
        return sidecar_directories(self._facts.checkpoint, self._options.sidecar_dir)

    @property
    def whole(self) -> bool:
        """Whether this worker has all layers, and is no mere stage of a pipeline."""
        return {stage.layer for stage in self.stages} == {layer.layer for layer in self.catalog.layers}

    def add(self, stage: ExpertStage) -> None:
        """Take a layer in; called when it has been constructed."""
        stage.loader = self
        stage.top_k = int(stage.module.top_k)
        self.stages.append(stage)
        self._waiting.add(stage.name)

    def sources(self) -> CheckpointFiles | None:
        """Where to look checkpoint tensors up; ``None`` when an earlier start has left a sidecar."""
        if not self._looked:
            self._pack = find_sidecar(self.directories, sidecar_name(self._facts.checkpoint, self._key), self._key)
            self._looked = True
        return None if self._pack is not None else self.files

    @functools.cached_property  # reads samples of all weights; asked for only when all layers have been added
    def _key(self) -> PackKey:
        layers = sorted(stage.layer for stage in self.stages)
        method = self.stages[0].method
        kernel = getattr(method, "experts_cls", None)
        layout = (
            f"{type(method).__name__} {getattr(kernel, '__name__', '')} {getattr(kernel, 'isa', '')}, "
            f"{self._facts.shard}, layers {layers[0]}..{layers[-1]}, {self.stages[0].module.params_dtype}"
        )
        return PackKey(
            model=self.catalog.fingerprint,
            content=content_digest(self._layout),
            layout=layout,
            library=self._facts.library,
        )

    def loaded(self, stage: ExpertStage) -> None:
        """Note that a layer's weights have been handed out; the last layer completes the experts."""
        if stage.name not in self._waiting:
            raise ExpertierError("Weights cannot be loaded a second time under Expertier.", "Start a new server.")
        stage.set_up()
        self._waiting.discard(stage.name)
        if not self._waiting:
            self.stages = layers_in_order(self.stages)
            self._complete(self._experts())

    def check(self) -> None:
        """Refuse a model of which something is missing when all of it should have been loaded.

        Raises
        ------
        UnsupportedModelError
            No layer was added.
        ModelFormatError
            A layer got no weights.
        """
        if not self.stages:
            raise UnsupportedModelError(
                "The layers of this worker have no routed experts.", "Use fewer pipeline stages."
            )
        if self._waiting:
            raise ModelFormatError(f"vLLM loaded no weights for {min(self._waiting)}.", "Fetch the checkpoint again.")

    def _experts(self) -> LoadedExperts:
        parts = {stage.layer: stage.parts() for stage in self.stages}
        with contextlib.closing(SourceReader(self._options.io_mode)) as reader:
            pack = self._pack or find_or_build(
                self.directories,
                sidecar_name(self._facts.checkpoint, self._key),
                key=self._key,
                parts=[part for stage in self.stages for part in parts[stage.layer]],
                produce=lambda: (view for stage in self.stages for view in stage.produce(reader)),
                announce=announce,
            )
        self.files.close()
        layers = pack.layers(
            LayerExperts(layer=stage.layer, experts=stage.experts, top_k=stage.top_k, parts=tuple(parts[stage.layer]))
            for stage in self.stages
        )
        file = StorageFile(pack.path, self._options.io_mode)
        weakref.finalize(self, file.close)
        moving = {f"{stage.name}.{row.param}" for stage in self.stages for row in stage.rows if row.moves}
        return LoadedExperts(
            stages=tuple(self.stages),
            layers=tuple(_only(layer, moving) for layer in layers),
            staying=tuple(tuple(part for part in layer.parts if part.name not in moving) for layer in layers),
            pack=pack,
            file=file,
        )


def _only(layer: LayerExperts, names: set[str]) -> LayerExperts:
    return LayerExperts(
        layer=layer.layer,
        experts=layer.experts,
        top_k=layer.top_k,
        parts=tuple(part for part in layer.parts if part.name in names),
    )
