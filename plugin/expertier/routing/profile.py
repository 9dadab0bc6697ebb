"""What a run learned of a model's routes: kept in a small file, it warms the next start.

The file is JSON with two keys: ``profile`` and ``digest``, the BLAKE2b-128 of the profile's text in canonical form.
It holds frequencies and measurements, no tokens and no text, and may be given to another machine: it is tied to the
model, not to where the model lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.catalog.types import Catalog
from expertier.errors import ProfileError

logger = logging.getLogger("expertier")

SUFFIX: Final = ".profile.json"
_FORMAT: Final = "expertier profile"
_VERSION: Final = 1
_MOST_BYTES: Final = 64 << 20
_LEAST_TOKENS: Final = 32.0  # a run that saw fewer has learned nothing worth a file
_REMEDY: Final = "Delete it, or name another file with profile; the next run writes a new one."


@dataclass(frozen=True, kw_only=True)
class RoutingProfile:
    """What a run learned.

    Attributes
    ----------
    fingerprint : str
        The model (:attr:`expertier.catalog.types.Catalog.fingerprint`).
    model, architecture : str
        For people.
    tokens : float
        Tokens from which it is known; old ones count less than new ones.
    chances : mapping of int to ndarray of float64, shape (experts,)
        Layer to the share of tokens that used each expert.
    ahead : mapping
        What loading ahead learned: precisions of predictions, and the gate's verdict. Plain data.
    predictor : str
        Which predictor ran, in words; empty for none.
    """

    fingerprint: str
    model: str
    architecture: str
    tokens: float
    chances: Mapping[int, NDArray[np.float64]]
    ahead: Mapping[str, Any] = field(default_factory=dict)
    predictor: str = ""


def profile_name(catalog: Catalog) -> str:
    """File name of a model's profile."""
    return f"{catalog.path.stem or 'model'}-{catalog.fingerprint[:8]}{SUFFIX}"


def read_profile(path: Path, catalog: Catalog) -> RoutingProfile:
    """Read a profile of a given model.

    Raises
    ------
    ProfileError
        It cannot be read, is damaged, was written by a newer Expertier, or is of another model.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"The profile {path} cannot be read: {error.strerror}.", _REMEDY) from error
    try:
        document = json.loads(raw[:_MOST_BYTES])
        body, digest = document["profile"], document["digest"]
        if body["format"] != _FORMAT or not isinstance(body["version"], int):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProfileError(f"{path} is not a profile, or was cut.", _REMEDY) from error
    if body["version"] > _VERSION:
        raise ProfileError(f"The profile {path} was written by a newer Expertier.", "Update Expertier, or delete it.")
    if digest != _digest(body):
        raise ProfileError(f"The profile {path} has changed since it was written.", _REMEDY)
    if body.get("fingerprint") != catalog.fingerprint:
        raise ProfileError(
            f"The profile {path} is of another model ({body.get('model')}).", "Name the one of this model, or none."
        )
    try:
        return _profile(body, catalog)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProfileError(f"The profile {path} contradicts itself.", _REMEDY) from error


def _profile(body: Mapping[str, Any], catalog: Catalog) -> RoutingProfile:
    chances = {}
    for layer in catalog.layers:
        row = np.array(body["chances"][str(layer.layer)], np.float64)
        if row.shape != (layer.experts,) or not ((row >= 0) & (row <= 1)).all():
            raise ValueError
        chances[layer.layer] = row
    tokens = float(body["tokens"])
    if not (math.isfinite(tokens) and tokens >= 0 and isinstance(body["ahead"], dict)):
        raise ValueError
    return RoutingProfile(
        fingerprint=str(body["fingerprint"]),
        model=str(body["model"]),
        architecture=str(body["architecture"]),
        tokens=tokens,
        chances=chances,
        ahead=body["ahead"],
        predictor=str(body["predictor"]),
    )


def write_profile(path: Path, profile: RoutingProfile) -> None:
    """Write a profile; whoever reads meanwhile gets the old one or the new one.

    Raises
    ------
    ProfileError
        It cannot be written.
    """
    body = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": profile.fingerprint,
        "model": profile.model,
        "architecture": profile.architecture,
        "tokens": round(profile.tokens, 1),
        "chances": {str(layer): np.round(row, 5).tolist() for layer, row in sorted(profile.chances.items())},
        "ahead": dict(profile.ahead),
        "predictor": profile.predictor,
    }
    text = json.dumps({"profile": body, "digest": _digest(body)}, separators=(",", ":"), allow_nan=False)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(handle, "w", encoding="utf-8") as file:
            os.fchmod(handle, 0o644)
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise ProfileError(f"The profile {path} cannot be written: {error.strerror}.", "Name another file.") from error


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Learner(Protocol):
    """Who learns what experts are used: the offload manager."""

    def warm(self, chances: Mapping[int, NDArray[np.float64]], tokens: float) -> None:
        """Begin with what an earlier run found."""

    def uses(self) -> tuple[dict[int, NDArray[np.float64]], float]:
        """Layer to the share of tokens that used each expert, and of how many tokens."""


class AheadLearner(Protocol):
    """Who learns what loading ahead is worth: :class:`expertier.routing.AheadLoader`."""

    def warm(self, learned: Mapping[str, Any]) -> None:
        """Begin with what an earlier run found."""

    def learned(self) -> Mapping[str, Any]:
        """What a later run may begin with; plain data."""

    def words(self) -> str:
        """What predicts."""


class ProfileKeeper:
    """Warms a run with the profile of its model, and writes what the run learned when it ends.

    Parameters
    ----------
    option : str
        Option ``profile``: ``off``, ``auto`` or a file.
    catalog : Catalog
        The model.
    directories : sequence of Path
        Where ``auto`` looks and writes, best place first.
    manager : Learner
        The offload manager.

    Attributes
    ----------
    found : RoutingProfile or None
        What earlier runs learned.

    Raises
    ------
    ProfileError
        A profile that was asked for by name exists and cannot be used. One that ``auto`` finds is left alone then, with
        a warning, and the next is written in its place.
    """

    def __init__(self, option: str, catalog: Catalog, directories: Sequence[Path], manager: Learner) -> None:
        self._catalog = catalog
        self._manager = manager
        self._process = os.getpid()
        self._named = option not in ("off", "auto")
        if self._named:
            self._places = [Path(option).expanduser().absolute()]
        else:
            self._places = [folder / profile_name(catalog) for folder in directories] if option == "auto" else []
        self._ahead: AheadLearner | None = None
        self.found: RoutingProfile | None = None
        # A Path's own method raises where a folder may not be looked into.
        present = [place for place in self._places if os.path.exists(place)]
        if present:
            self.found = self._read(present[0])
        if self.found is not None:
            manager.warm(self.found.chances, self.found.tokens)

    def _read(self, place: Path) -> RoutingProfile | None:
        try:
            return read_profile(place, self._catalog)
        except ProfileError as error:
            if self._named:
                raise
            logger.warning("%s", error)
            return None

    def follow(self, ahead: AheadLearner) -> None:
        """Warm what loads ahead, too, and keep what it learns."""
        self._ahead = ahead
        if self.found is not None:
            ahead.warm(self.found.ahead)

    def close(self) -> None:
        """Write what the run learned, earlier runs included, to the first place that takes it.

        The run is over by now, so a profile that cannot be written is logged and not raised. A run of a few tokens
        writes none, nor does a forked child.
        """
        if not self._places or os.getpid() != self._process:
            return
        chances, tokens = self._manager.uses()
        before = self.found.tokens if self.found is not None else 0.0
        if abs(tokens - before) < _LEAST_TOKENS:
            return
        profile = RoutingProfile(
            fingerprint=self._catalog.fingerprint,
            model=self._catalog.path.name,
            architecture=self._catalog.architecture,
            tokens=tokens,
            chances=chances,
            ahead=self._ahead.learned() if self._ahead is not None else {},
            predictor=self._ahead.words() if self._ahead is not None else "",
        )
        for place in self._places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_profile(place, profile)
            except (ProfileError, OSError) as error:
                logger.log(logging.WARNING if self._named else logging.INFO, "%s", error)
            else:
                return
