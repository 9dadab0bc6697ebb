"""ONE table of options: from it come the JSON keys, environment variables, command-line flags and the README table."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from expertier.config_file import read_config
from expertier.errors import ConfigFileError, UnsupportedOptionError

ENV_PREFIX = "EXPERTIER_"


def _option(default: Any, help_text: str, *, zero: bool = False, most: float = math.inf) -> Any:
    # Numbers are above zero, but for those that may be.
    return field(default=default, metadata={"help": help_text, "zero": zero, "most": most})


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """Everything a user can set, for every engine.

    Build it with :meth:`from_mapping`, which also reads the environment. ``expert_`` is the prefix of the keyword
    arguments and flags inside an engine (``expert_budget=``), where plain names would be ambiguous.
    """

    budget: str | int = _option("auto", "Memory for experts: bytes, '8GiB', '25%' of all experts, or 'auto'.")
    policy: Literal["auto", "lfu", "lru", "lfru", "edge", "predictive"] = _option(
        "auto", "Eviction policy; 'auto' = predictive where a trained predictor is at hand, else lfu."
    )
    half_life: float | None = _option(None, "Half-life of use counts in tokens (lfu, predictive: 16, lfru: 64).")
    lookahead: Literal["auto", "on", "off"] = _option(
        "auto", "Load the next layer's likely experts early; 'auto' keeps it only while it pays."
    )
    predictor: str = _option(
        "auto",
        "Trained predictor of routes: 'auto' = one next to this model or in the cache, the folder of one, 'off'.",
    )
    profile: str = _option(
        "auto",
        "What earlier runs learned warms this one: 'auto' = next to the model or in the cache, a file, or 'off'.",
    )
    repack: Literal["auto", "on", "off"] = _option(
        "auto", "Kernels: 'on' = repacked weights as default llama.cpp (needs a sidecar file), 'off' = plain."
    )
    io_mode: Literal["auto", "direct", "buffered"] = _option("auto", "How experts are read from storage.")
    io_threads: int = _option(2, "Reads in flight at a time.", most=256)
    margin: str | int = _option("auto", "Memory budget 'auto' leaves free for the system.")
    governor: Literal["off", "on"] = _option(
        "off", "Give experts' memory back under memory pressure, and take it again slowly, instead of being killed."
    )
    sidecar_dir: str | None = _option(None, "Where the repacked sidecar goes (default: next to the model).")
    trace: str | None = _option(None, "Record the routers' choices into this file; a trace of the model is continued.")
    trace_tokens: Literal["off", "on"] = _option("off", "Record token ids, too: they tell what was read and written.")
    trace_hidden: int | None = _option(None, "Record the routers' inputs of every so many decoded tokens, too.")
    quality_budget: str | float | None = _option(
        None,
        "Lossy: what may be lost for speed: '1%' of perplexity (from the model's quality profile), or a bias; 'exact' "
        "says that nothing may.",
    )
    virtual_bias: float | None = _option(
        None,
        "Lossy: resident experts stand in for absent ones; this share of a token's gate weight is the most that one "
        "may lose (0.05 is mild, 0.2 strong).",
        zero=True,
    )
    virtual_protect: int | None = _option(None, "So many of a token's first experts are never stood in for.")
    virtual_prefill: Literal["off", "on"] = _option("off", "Whether prompts may be computed with stand-ins, too.")
    virtual_hard: Literal["off", "on"] = _option(
        "off", "Very lossy: tokens go to resident experts only and no step waits (SwapMoE as published)."
    )
    config: str | None = _option(None, "JSON file with options, as `expertier plan --apply` writes it.")

    def changed(self) -> dict[str, Any]:
        """Options that are not at their defaults."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) != item.default}

    @property
    def plain_policy(self) -> str:
        """The eviction policy of a run that no predictor tells anything."""
        return "lfu" if self.policy == "auto" else self.policy

    def check_trace(self) -> None:
        """Refuse what says how a trace is recorded where none is.

        Raises
        ------
        UnsupportedOptionError
            ``trace_tokens`` or ``trace_hidden`` was asked for without ``trace``.
        """
        if self.trace is None and (self.trace_tokens == "on" or self.trace_hidden is not None):
            raise UnsupportedOptionError(
                "trace_tokens and trace_hidden do nothing without trace.", "Name the file of the trace, too."
            )

    def untraced(self) -> OffloadOptions:
        """The same options, but nothing is recorded."""
        return replace(self, trace=None, trace_tokens="off", trace_hidden=None)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any] | None = None) -> OffloadOptions:
        """Combine explicit options, the environment, a file of options and the defaults, in that order of precedence.

        Parameters
        ----------
        given : mapping of str to object, optional
            Options by field name; ``None`` values count as not given.

        Raises
        ------
        UnsupportedOptionError
            For an unknown name, a value outside an option's choices, no text where text is needed, or a number that is
            not above zero, from any source; the message names the environment variable or the file where the value came
            from one.
        ConfigFileError
            The file that ``config`` names cannot be read.
        """
        known = {option.name for option in fields(cls)}
        values: dict[str, Any] = {}
        origins = {name: name for name in known}
        for name in known:
            variable = ENV_PREFIX + name.upper()
            text = os.environ.get(variable)
            if text is not None:
                values[name] = text
                origins[name] = variable
        for name, value in (given or {}).items():
            if name not in known:
                raise UnsupportedOptionError(
                    f"Expertier has no option {name!r}.", f"Options are: {', '.join(sorted(known))}."
                )
            if value is not None:
                values[name] = value
                origins[name] = name
        if "config" in values:
            path = Path(_text(origins["config"], values["config"], switch=False))
            for name, value in read_config(path).items():
                if name not in known or name == "config":
                    raise ConfigFileError(
                        f"{path} holds {name!r}, which is no option.", f"Options are: {', '.join(sorted(known))}."
                    )
                if name not in values and value is not None:
                    values[name] = value
                    origins[name] = f"{name} in {path}"
        hints = get_type_hints(cls)
        bounds = {option.name: option.metadata for option in fields(cls)}
        return cls(
            **{name: _convert(origins[name], value, hints[name], bounds[name]) for name, value in values.items()}
        )


def _convert(name: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> Any:
    if get_origin(hint) is Literal:
        if isinstance(value, bool):
            value = "on" if value else "off"
        choices = get_args(hint)
        if value not in choices:
            raise UnsupportedOptionError(f"{name}={value!r} is not possible.", f"Choose from: {', '.join(choices)}.")
        return value
    accepted = get_args(hint) or (hint,)
    for kind in (int, float):
        if kind in accepted and str not in accepted:
            return _number(name, value, kind, zero=bounds["zero"], most=bounds["most"])
    return value if {int, float} & set(accepted) else _text(name, value, switch=hint is str)


def _text(name: str, value: Any, *, switch: bool) -> str:
    """A name or a path; `switch`: one that can be turned off."""
    if value is False and switch:
        return "off"
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise UnsupportedOptionError(f"{name}={value!r} is neither a name nor a path.", "Write it as text.")
    return text


def _number(name: str, value: Any, kind: type[int] | type[float], *, zero: bool, most: float) -> int | float:
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UnsupportedOptionError(f"{name}={value!r} is not a number.") from error
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and number != value):
        raise UnsupportedOptionError(f"{name}={value!r} is not a whole number.")
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise UnsupportedOptionError(f"{name}={value!r} is not above zero{', nor zero' if zero else ''}.")
    if number > most:
        raise UnsupportedOptionError(f"{name}={value!r} is too much.", f"Give at most {most}.")
    return number
