"""What a comparison writes down: typed records that survive a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from expertier.errors import ExpertierError
from expertier.planning.calibrate import DiskSpeed
from expertier.quality.statistics import Interval

SCHEMA = "expertier-comparison/1"

RunStatus = Literal["ok", "killed", "refused", "failed", "timeout"]
"""``killed``: by the kernel at the memory limit; ``refused``: Expertier named a reason; ``failed``: anything else."""
ArmStatus = Literal["ok", "killed", "refused", "failed", "timeout", "not run"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machine.

    Attributes
    ----------
    cpu : str
        Name of the processor.
    cores : int
        Cores this process may use.
    memory_bytes : int
        Installed memory.
    kernel : str
        Name and release of the system.
    filesystem : str
        Type of the filesystem that holds the model.
    device : str
        Block device below it, empty if there is none.
    readahead_kb : int or None
        Readahead of that device as found.
    """

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    filesystem: str
    device: str
    readahead_kb: int | None


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model: file name, identity and shape. ``types`` are the storage types of its experts."""

    name: str
    fingerprint: str
    architecture: str
    file_bytes: int
    expert_bytes_total: int
    other_bytes: int
    layers: int
    experts: int
    top_k: int
    largest_expert_bytes: int
    types: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for; the same for all arms.

    Attributes
    ----------
    repeats, tokens : int
        Repeats of every arm; tokens decoded per repeat, over all prompts.
    prompts, short_prompt, long_prompt : int
        Number of decode prompts, their length and the length of the long prompt, in tokens.
    texts : str
        Where the text comes from.
    domains : tuple of str
        What kinds of text the decode prompts are.
    budget : str
        Expertier's budget within a limit.
    n_ubatch, threads : int
        Engine settings.
    wait_policy : str
        ``OMP_WAIT_POLICY`` of all arms.
    cold_start : str
        How the page cache was emptied before each run.
    confinement : str
        What enforced the memory limits.
    requests : tuple of int
        Numbers of requests at a time that were measured; empty for single sequences alone.
    evidence : str
        What the digests of outputs are made of: all logits, or greedy tokens.
    """

    repeats: int
    tokens: int
    prompts: int
    short_prompt: int
    long_prompt: int
    texts: str
    domains: tuple[str, ...]
    budget: str
    n_ubatch: int
    threads: int
    wait_policy: str
    cold_start: str
    confinement: str
    requests: tuple[int, ...] = ()
    evidence: Literal["logits", "tokens"] = "logits"


@dataclass(frozen=True, kw_only=True)
class OffloadFigures:
    """What Expertier counted in one run; hits, stall and bytes are those of the decode part.

    Attributes
    ----------
    mode : str
        The mode line.
    budget_bytes, peak_resident_bytes, total_bytes : int
        The limit, the most ever held, and what all experts would take.
    hit_ratio, ready_hit_ratio : float or None
        Shares of needed experts that were resident or on their way, and resident.
    misses_per_token, stall_ms_per_token, read_bytes_per_token : float
        Loads begun on demand, time compute waited, and bytes read by Expertier.
    bias, calibrated_bias : float or None
        Of virtual experts: in force at the end, and what a quality budget allows here.
    substituted : tuple of float
        Share of a token's gate mass that stand-ins took while decoding, by layer; empty in exact runs.
    """

    mode: str
    budget_bytes: int
    peak_resident_bytes: int
    total_bytes: int
    hit_ratio: float | None
    ready_hit_ratio: float | None
    misses_per_token: float
    stall_ms_per_token: float
    read_bytes_per_token: float
    bias: float | None = None
    calibrated_bias: float | None = None
    substituted: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QualityFigures:
    """What a lossy run lost against an exact one on the same tokens.

    Attributes
    ----------
    tokens : int
        Predicted tokens.
    cross_entropy, exact_cross_entropy : float
        Nats per token.
    increase : Interval
        Relative increase of the perplexity; its interval is over texts.
    kl : float
        KL divergence from the exact distributions, nats per token.
    agreement : float
        Share of positions with the same likeliest token.
    exact_read_bytes_per_token : float or None
        What the exact run read while it decoded, ahead of need or not.
    """

    tokens: int
    cross_entropy: float
    exact_cross_entropy: float
    increase: Interval
    kl: float
    agreement: float
    exact_read_bytes_per_token: float | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """So many requests made at the same moment; those of a run with one request at a time are put together.

    Attributes
    ----------
    requests : int
        At a time.
    seconds : float
        From making the requests to the last token.
    tokens : int
        Tokens generated.
    ttft_seconds : tuple of float
        Each request's first token.
    token_seconds : tuple of float
        Each later token of each request: time since the one before.
    read_bytes : int
        Read from storage.
    hit_ratio, ready_hit_ratio, stall_seconds : float or None
        Expertier's own figures, prompts included.
    """

    requests: int
    seconds: float
    tokens: int
    ttft_seconds: tuple[float, ...]
    token_seconds: tuple[float, ...]
    read_bytes: int
    hit_ratio: float | None = None
    ready_hit_ratio: float | None = None
    stall_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all requests together, prompts included in the time."""
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Raw figures of one successful run.

    Attributes
    ----------
    load_seconds : float
        Constructing the model.
    ttft_long_seconds : float
        The long prompt, first thing after loading.
    ttft_short_seconds : tuple of float
        Each decode prompt, on an empty KV cache.
    token_seconds : tuple of float
        Each decoded token in order, the first one after a prompt included.
    peak_rss_bytes : int
        High-water mark of resident memory, mapped file pages included; of several processes the largest.
    read_bytes, decode_read_bytes : int
        Bytes this process caused to be read from storage, in total and while decoding.
    tokens_digest, logits_digest : str
        SHA-256 over the tokens fed and over the logits after each of them (or over what ``Settings.evidence`` names).
    choices : tuple of int
        The likeliest next token after each token fed.
    kernels : str
        Which kernels multiplied the experts; logits are comparable bit by bit within one kind.
    offload : OffloadFigures or None
        Expertier's own counters.
    loads : tuple of Load
        Several requests at a time.
    quality : QualityFigures or None
        Of a lossy arm.
    """

    load_seconds: float
    ttft_long_seconds: float
    ttft_short_seconds: tuple[float, ...]
    token_seconds: tuple[float, ...]
    peak_rss_bytes: int
    read_bytes: int
    decode_read_bytes: int
    tokens_digest: str
    logits_digest: str
    choices: tuple[int, ...]
    kernels: str
    offload: OffloadFigures | None = None
    loads: tuple[Load, ...] = ()
    quality: QualityFigures | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decode speed."""
        return len(self.token_seconds) / sum(self.token_seconds)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One repeat of one arm.

    Attributes
    ----------
    repeat : int
        From 0.
    status : str
        How it ended.
    reason : str
        Why, unless it is ``ok``.
    wall_seconds : float
        From starting the process to its end.
    peak_memory_bytes : int or None
        High-water mark of the control group, page cache included.
    oom_kills : int
        Processes the kernel killed in the control group.
    cached_before_bytes : int or None
        Bytes of the model still in the page cache at the start.
    figures : Figures or None
        What was measured.
    """

    repeat: int
    status: RunStatus
    reason: str = ""
    wall_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    oom_kills: int = 0
    cached_before_bytes: int | None = None
    figures: Figures | None = None


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """One arm under one limit.

    Attributes
    ----------
    key, label : str
        Short name, the same under all limits, and the name people read.
    ours : bool
        Whether it is Expertier rather than the stock engine.
    lossy : bool
        Whether it may compute something else than stock.
    limit_bytes : int or None
        The memory limit.
    limit : str
        The limit as it was written.
    settings : dict
        What is special about the arm.
    readahead_kb : int or None
        Readahead during its runs; ``None`` = as the machine has it.
    status : str
        ``ok`` if every run was.
    reason : str
        Why not.
    runs : tuple of Run
        In the order of repeats.
    """

    key: str
    label: str
    ours: bool
    limit_bytes: int | None
    limit: str
    settings: dict[str, Any]
    readahead_kb: int | None = None
    lossy: bool = False
    status: ArmStatus = "ok"
    reason: str = ""
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What the simulator says that nothing can beat under a limit, on the routes of the same texts.

    Attributes
    ----------
    limit : str
        The limit as it was written.
    label : str
        What is assumed.
    tokens_per_second : float
        Decode speed.
    hit_ratio, read_bytes_per_token : float
        Of its evictions.
    """

    limit: str
    label: str
    tokens_per_second: float
    hit_ratio: float
    read_bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything about one comparison. ``complete`` is false while runs are still to come."""

    created: str
    command: tuple[str, ...]
    engine: str
    versions: dict[str, str]
    hardware: Hardware
    model: ModelRecord
    settings: Settings
    disk: tuple[DiskSpeed, ...] = ()
    arms: tuple[ArmRecord, ...] = ()
    notes: tuple[str, ...] = ()
    bounds: tuple[Bound, ...] = ()
    complete: bool = False
    schema: str = field(default=SCHEMA)

    def write(self, path: Path) -> None:
        """Write as JSON; the file is complete or not there at all."""
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def read_comparison(path: Path) -> Comparison:
    """Read what :meth:`Comparison.write` wrote.

    Raises
    ------
    ExpertierError
        The file is missing or is no comparison.
    """
    remedy = "Name a directory that `expertier compare --out` wrote."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExpertierError(f"Cannot read the comparison {path}: {reason}.", remedy) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ExpertierError(f"{path} is not a comparison of this version of Expertier ({SCHEMA}).", remedy)
    try:
        return typing.cast(Comparison, from_plain(Comparison, data))
    except (KeyError, TypeError, ValueError) as error:
        raise ExpertierError(f"The comparison {path} is damaged: {error}.", remedy) from error


def shareable(record: object, model: Path) -> str:
    """Write a benchmark's own record as JSON, without the folder in which the model lies.

    Engines' mode lines tell where the sidecar is, which is nobody else's business.
    """
    return json.dumps(record, indent=1, default=vars).replace(f"{model.parent}{os.sep}", "")


def from_plain(hint: Any, value: Any) -> Any:
    """Build a dataclass (or a tuple, an optional, a dict of them) from plain JSON data.

    Parameters
    ----------
    hint : type
        What to build.
    value : object
        What ``json.loads`` gave.

    Raises
    ------
    TypeError, ValueError
        Fields are missing or unknown, or a value is of another type.
    """
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise TypeError(f"{hint.__name__} expected, found {value!r:.60}")
        hints = typing.get_type_hints(hint)
        unknown = value.keys() - hints.keys()
        if unknown:
            raise TypeError(f"{hint.__name__} has no field {min(unknown)}")
        return hint(**{name: from_plain(hints[name], item) for name, item in value.items()})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"a list expected, found {value!r:.60}")
        return tuple(from_plain(typing.get_args(hint)[0], item) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"an object expected, found {value!r:.60}")
        return {key: from_plain(typing.get_args(hint)[1], item) for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return from_plain(next(option for option in typing.get_args(hint) if option is not type(None)), value)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{value!r:.60} is none of {', '.join(typing.get_args(hint))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is not Any and not (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        raise TypeError(f"{hint.__name__} expected, found {value!r:.60}")
    return value
