"""Trained predictors on storage: a folder with ``predictor.json`` and a safetensors file for each part.

The JSON says for which model they were trained, which parts there are, the digest of each file and how the training
went. Numbers are read as numbers and nothing is executed or unpickled, so a folder from a stranger is only data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from expertier.catalog.safetensors_header import read_header
from expertier.errors import (
    ExpertierError,
    PredictorError,
    PredictorFormatError,
    PredictorMissingError,
    PredictorVersionError,
)
from expertier.routing.blend import DISTANCES, INPUTS, PARTS, BlendScorer, BlendWeights
from expertier.routing.history import Scorer, SequencePredictor
from expertier.routing.path import PathScorer, PathShape
from expertier.routing.predictor import HORIZONS, RoutedModel, RoutePredictor
from expertier.routing.table import LayerTable, TableScorer, TokenCounts, TokenScorer

FORMAT: Final = "expertier-predictor"
VERSION: Final = 1
MANIFEST: Final = "predictor.json"
NAMES: Final = ("blend", *PARTS)
"""Predictors a folder can hold, the best first."""

_MOST_MANIFEST = 16 << 20
_AGAIN = "Train it again with `expertier train`."

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training gives.

    Attributes
    ----------
    model : RoutedModel
        For which.
    table : LayerTable
        Counts by layer.
    blend : BlendWeights
        Weights of the mixture.
    tokens : TokenCounts or None
        Counts by token; ``None`` of traces without token ids.
    path : tuple of PathShape and dict, or None
        Sizes and weights of the network; the same.
    facts : dict
        How the training went.
    """

    model: RoutedModel
    table: LayerTable
    blend: BlendWeights
    tokens: TokenCounts | None = None
    path: tuple[PathShape, dict[str, NDArray[np.float32]]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Predictors there are, the best first."""
        have = {"blend": True, "path": self.path is not None, "tokens": self.tokens is not None, "table": True}
        return tuple(name for name in NAMES if have[name])

    def predictor(self, name: str = "blend", model: RoutedModel | None = None) -> RoutePredictor:
        """Build one of the predictors.

        Parameters
        ----------
        name : str
            One of :data:`NAMES`.
        model : RoutedModel, optional
            The one that is run, which may be a conversion of that which was trained on.

        Raises
        ------
        PredictorMissingError
            There is no such predictor, or it was not trained.
        """
        if name not in NAMES:
            raise PredictorMissingError(f"There is no predictor {name!r}.", f"Choose from: {', '.join(NAMES)}.")
        if name not in self.names:
            raise PredictorMissingError(
                f"The predictor {name!r} was not trained.",
                f"Train it on traces with token ids, or choose from: {', '.join(self.names)}.",
            )
        scorer: Scorer = self._blend() if name == "blend" else self._part(name)
        return SequencePredictor(name, model or self.model, scorer)

    def _part(self, name: str) -> Scorer:
        if name == "path":
            assert self.path is not None
            return PathScorer(self.model, *self.path)
        if name == "tokens":
            assert self.tokens is not None
            return TokenScorer(self.model, self.tokens)
        return TableScorer(self.model, self.table)

    def _blend(self) -> BlendScorer:
        parts = {name: self._part(name) for name in PARTS if name in self.names}
        return BlendScorer(self.model, parts, self.table.frequency, self.blend)


def save(folder: Path, trained: Trained) -> None:
    """Write a folder.

    Raises
    ------
    PredictorFormatError
        It cannot be written.
    """
    from safetensors.numpy import save as encode

    parts: dict[str, Arrays] = {"table": dict(trained.table.arrays()), "blend": dict(trained.blend.arrays())}
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": asdict(trained.model)}
    if trained.tokens is not None:
        parts["tokens"] = dict(trained.tokens.arrays())
    if trained.path is not None:
        shape, weights = trained.path
        # Half precision for the largest of them: it is looked up, not summed.
        parts["path"] = {**weights, "embedding.weight": weights["embedding.weight"].astype(np.float16)}
        manifest["path"] = asdict(shape)
    manifest["facts"] = trained.facts
    manifest["files"] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, arrays in parts.items():
            data = encode({key: np.ascontiguousarray(value) for key, value in arrays.items()})
            _replace(folder / f"{name}.safetensors", data)
            manifest["files"][name] = _digest(data)
        _replace(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        raise PredictorFormatError(
            f"The predictor cannot be written to {folder}: {error.strerror}.", "Choose another folder."
        ) from error


def load(folder: Path, model: RoutedModel | None = None) -> Trained:
    """Read a folder.

    Parameters
    ----------
    folder : Path
        That `expertier train` wrote.
    model : RoutedModel, optional
        For which it must have been trained.

    Raises
    ------
    PredictorMissingError
        There is none.
    PredictorFormatError, PredictorVersionError
        It cannot be read.
    PredictorMismatchError
        It was trained for another model.
    """
    manifest = _manifest(folder)
    try:
        trained_for = _model(manifest["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorFormatError(f"{folder / MANIFEST} describes no possible model.", _AGAIN) from error
    if model is not None:
        model.require(trained_for, f"The predictor in {folder}")
    try:
        trained = _parts(folder, manifest, trained_for)
    except PredictorError:
        raise
    except (ExpertierError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PredictorFormatError(f"The predictor in {folder} cannot be read: {error}", _AGAIN) from error
    return trained


def load_predictor(folder: Path, model: RoutedModel, name: str = "blend") -> RoutePredictor:
    """Read one predictor of a folder; see :func:`load` and :meth:`Trained.predictor`."""
    return load(folder, model).predictor(name, model)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_MANIFEST + 1)
    except FileNotFoundError as error:
        raise PredictorMissingError(
            f"{folder} holds no trained predictor.", "Train one with `expertier train TRACE --out FOLDER`."
        ) from error
    except OSError as error:
        raise PredictorFormatError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    try:
        manifest = json.loads(data)
        version = manifest["version"] if manifest["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if type(version) is not int:
        raise PredictorFormatError(f"{path} does not describe a predictor.", _AGAIN)
    if version > VERSION:
        raise PredictorVersionError(
            f"{path} has version {version} of the format, this Expertier reads up to {VERSION}.",
            "Use a newer Expertier.",
        )
    found: dict[str, Any] = manifest
    return found


def _model(value: Mapping[str, Any]) -> RoutedModel:
    numbers = {name: tuple(value[name]) for name in ("layers", "experts", "top_k")}
    flat = [number for values in numbers.values() for number in values]
    if (
        not numbers["layers"]
        or len({len(values) for values in numbers.values()}) != 1
        or not all(type(number) is int and 0 <= number < 1 << 15 for number in flat)
        or not all(0 < k <= n for k, n in zip(numbers["top_k"], numbers["experts"], strict=True))
        or not all(isinstance(value[name], str) for name in ("routers", "fingerprint", "name"))
    ):
        raise ValueError
    return RoutedModel(**numbers, routers=value["routers"], fingerprint=value["fingerprint"], name=value["name"])


def _parts(folder: Path, manifest: Mapping[str, Any], model: RoutedModel) -> Trained:
    layers, experts = model.shape
    files = manifest["files"]
    table = _read(folder, "table", files["table"])
    keyed = table["keyed"]
    _check(folder, "table", table, {"frequency": (layers, experts), "linear": (layers, 2 * experts + 1, experts)})
    if keyed.size:
        _check(folder, "table", table, {"keyed": (layers, experts**2, experts)})
    blend = _read(folder, "blend", files["blend"])
    _check(folder, "blend", blend, {"now": (2, DISTANCES, layers, len(INPUTS)), "soon": (len(HORIZONS), layers, 3)})
    tokens = path = None
    if "tokens" in files:
        arrays = _read(folder, "tokens", files["tokens"])
        _check(folder, "tokens", arrays, {"frequency": (layers, experts)})
        tokens = TokenCounts(**arrays)
        ends = tokens.starts
        if (
            len(ends) != len(tokens.seen) + 1
            or ends[0] != 0
            or (np.diff(ends) < 0).any()
            or not ends[-1] == len(tokens.cells) == len(tokens.counts)
            or (len(tokens.cells) and not 0 <= tokens.cells.min() <= tokens.cells.max() < layers * experts)
            or (tokens.seen < 0).any()
        ):
            raise ValueError("its token counts contradict themselves.")
    if "path" in files:
        shape = PathShape(**manifest["path"])
        if (shape.layers, shape.experts) != (layers, experts):
            raise ValueError("its network is of another size than its model.")
        arrays = _read(folder, "path", files["path"])
        _check(folder, "path", arrays, shape.tensors())
        path = (shape, {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()})
    return Trained(
        model=model,
        table=LayerTable(**table),
        blend=BlendWeights(**blend),
        tokens=tokens,
        path=path,
        facts=dict(manifest.get("facts", {})),
    )


_TYPES: Final = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}


def _read(folder: Path, name: str, digest: str) -> Arrays:
    path = folder / f"{name}.safetensors"
    header = read_header(path)
    data = path.read_bytes()
    if _digest(data) != digest:
        raise PredictorFormatError(f"{path} is not the file that was saved with {folder / MANIFEST}.", _AGAIN)
    found: Arrays = {}
    for tensor in header.tensors:
        if tensor.dtype not in _TYPES:
            raise PredictorFormatError(f"{path} holds numbers of the type {tensor.dtype}.", _AGAIN)
        raw = np.frombuffer(data, _TYPES[tensor.dtype], int(np.prod(tensor.shape, dtype=np.int64)), tensor.offset)
        if raw.dtype.kind == "f" and not np.isfinite(raw).all():
            raise PredictorFormatError(f"{path} holds numbers that are none.", _AGAIN)
        found[tensor.name] = raw.reshape(tensor.shape)
    return found


def _check(folder: Path, name: str, arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for key, shape in shapes.items():
        if key not in arrays or arrays[key].shape != shape:
            had = arrays[key].shape if key in arrays else None
            raise PredictorFormatError(
                f"{folder / name}.safetensors: {key} should have shape {shape}, not {had}.", _AGAIN
            )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_bytes(data)
    part.replace(path)
