"""The quality profile of a model: what was measured on text, as one JSON file beside the model or in the cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from expertier import __version__
from expertier.catalog.sidecar import sidecar_directories
from expertier.catalog.types import Catalog
from expertier.comparison.records import from_plain
from expertier.errors import QualityProfileError
from expertier.quality.proxy import Proxy
from expertier.quality.statistics import Interval

SCHEMA = "expertier-quality/1"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting, measured.

    Attributes
    ----------
    share : float
        Part of all experts that the memory budget held.
    bias : float
        Share of a token's gate weight that residency was worth.
    protect : int
        First experts of a token that were never replaced.
    hard : bool
        Whether resident experts alone were chosen from (the bias is 0 then and means nothing).
    increase : Interval
        Relative increase of the perplexity.
    kl : Interval
        KL divergence from the exact distributions, nats per token.
    agreement : float
        Share of positions with the same likeliest token.
    loads_per_token, bytes_per_token : float
        Loads begun on demand, bytes read.
    substituted : tuple of float
        Gate mass per token that stand-ins took, by layer.
    """

    share: float
    bias: float
    protect: int
    hard: bool = False
    increase: Interval
    kl: Interval
    agreement: float
    loads_per_token: float
    bytes_per_token: float
    substituted: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class QualityProfile:
    """What a lossy mode costs a model.

    Attributes
    ----------
    fingerprint, model : str
        Which model.
    version : str
        The Expertier that measured.
    engine : str
        With which engine.
    policy : str
        Eviction policy: it decides who is absent.
    texts, tokens : int
        How much text, and how much of it per point.
    domains : tuple of str
        What kinds of text.
    text_digest : str
        SHA-256 over their tokens: points of the same texts can be put together.
    exact_cross_entropy : float
        Of the exact model on it, nats per token.
    points : tuple of Point
        What was measured; bias 0 of every memory budget is among them.
    proxy : Proxy
        From substituted gate mass to KL divergence.
    """

    fingerprint: str
    model: str
    version: str = __version__
    engine: str
    policy: str
    texts: int
    tokens: int
    domains: tuple[str, ...]
    text_digest: str = ""
    exact_cross_entropy: float
    points: tuple[Point, ...]
    proxy: Proxy
    created: str = ""
    schema: str = field(default=SCHEMA)

    @property
    def shares(self) -> tuple[float, ...]:
        """Memory budgets with a curve, ascending."""
        return tuple(sorted({point.share for point in self.points if not point.hard}))

    @property
    def protects(self) -> tuple[int, ...]:
        """Numbers of protected experts that were measured, ascending."""
        return tuple(sorted({point.protect for point in self.points if point.bias and not point.hard}))

    def curve(self, share: float, protect: int) -> tuple[Point, ...]:
        """Points of one memory budget by ascending bias, from 0; empty without any above 0."""
        mine = [
            point
            for point in self.points
            if point.share == share and not point.hard and (point.protect == protect or not point.bias)
        ]
        found = tuple(sorted(mine, key=lambda point: point.bias))
        return found if found and found[-1].bias else ()

    def command(self, share: float | None = None) -> str:
        """The command that measures (again, or at another memory budget)."""
        return profile_command(self.model, share, vllm=self.engine == "vLLM")

    def write(self, path: Path) -> None:
        """Write as JSON with a checksum; the file is complete or not there at all.

        Raises
        ------
        QualityProfileError
            It cannot be written.
        """
        plain = asdict(self)
        partial = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**plain, "checksum": _checksum(plain)}, indent=1, allow_nan=False)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise QualityProfileError(
                f"The quality profile {path} cannot be written: {error.strerror}.", "Choose another --sidecar-dir."
            ) from error


def profile_command(model: str, share: float | None = None, *, vllm: bool = False) -> str:
    """Tell the command that measures a quality profile."""
    engine = " --engine vllm" if vllm else ""
    at = "" if share is None else f" --at {max(1, math.floor(100 * share))}%"
    return f"expertier profile {model} --quality{engine}{at} --text FILES"


def _command(catalog: Catalog) -> str:
    # A model's files decide which engine runs it, and so does a profile, which belongs to those files.
    return profile_command(catalog.path.name, vllm=catalog.format == "safetensors")


def profile_paths(catalog: Catalog, sidecar_dir: str | None) -> list[Path]:
    """Where a model's quality profile may lie, best place first."""
    beside = catalog.path if catalog.path.is_dir() else catalog.path.parent
    name = f"{catalog.path.stem}-{catalog.fingerprint[:12]}.quality.json"
    return [folder / name for folder in sidecar_directories(beside, sidecar_dir)]


def find_profile(catalog: Catalog, sidecar_dir: str | None, *, policy: str | None = None) -> QualityProfile:
    """Read the profile of a model.

    Raises
    ------
    QualityProfileError
        There is none, or it cannot be used; the message names the command that makes one.
    """
    for path in profile_paths(catalog, sidecar_dir):
        if os.path.isfile(path):  # a Path's own method raises where a folder may not be looked into
            return read_profile(path, catalog, policy=policy)
    raise QualityProfileError(
        f"A percentage of perplexity needs a quality profile, and there is none for {catalog.path.name}.",
        f"Make one: {_command(catalog)}.",
    )


def read_profile(path: Path, catalog: Catalog, *, policy: str | None = None) -> QualityProfile:
    """Read and check one file.

    Parameters
    ----------
    path : Path
        The file.
    catalog : Catalog
        The model it must be of.
    policy : str, optional
        The eviction policy it must have been measured with.

    Raises
    ------
    QualityProfileError
        It cannot be read, has changed since it was written, or is of another model, version or policy.
    """
    remedy = f"Make it again: {_command(catalog)}."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QualityProfileError(f"Cannot read the quality profile {path}: {reason}.", remedy) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise QualityProfileError(f"{path} is not a quality profile of this version of Expertier ({SCHEMA}).", remedy)
    if data.pop("checksum", None) != _checksum(data):
        raise QualityProfileError(f"The quality profile {path} is damaged: its checksum is another.", remedy)
    try:
        profile: QualityProfile = from_plain(QualityProfile, data)
    except (KeyError, TypeError, ValueError) as error:
        raise QualityProfileError(f"The quality profile {path} is damaged: {error}.", remedy) from error
    if profile.fingerprint != catalog.fingerprint:
        raise QualityProfileError(f"The quality profile {path} is of another model ({profile.model}).", remedy)
    if profile.version != __version__:
        raise QualityProfileError(
            f"The quality profile {path} was measured by Expertier {profile.version}, this is {__version__}.", remedy
        )
    if policy is not None and policy != profile.policy:
        raise QualityProfileError(
            f"The quality profile {path} was measured with policy {profile.policy}, which decides who is absent.",
            f"Use that policy, or make it again: {_command(catalog)} --policy {policy}.",
        )
    return profile


def merged(old: QualityProfile, new: QualityProfile) -> QualityProfile:
    """Add what an older profile knows of other memory budgets, if it was measured on the same texts.

    The proxy is that of the measurement with more rows.
    """
    if (old.text_digest, old.engine, old.policy) != (new.text_digest, new.engine, new.policy):
        return new
    known = {(point.share, point.hard) for point in new.points}
    kept = [point for point in old.points if (point.share, point.hard) not in known]
    return replace(new, points=(*kept, *new.points), proxy=max(new.proxy, old.proxy, key=lambda proxy: proxy.rows))


def _checksum(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=True).encode()).hexdigest()
