"""How far a request may fall behind first come, first served."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from expertier.config import ENV_PREFIX
from expertier.errors import UnsupportedOptionError

PREFIX: Final = "fairness_"
"""Of the options that set a limit, in every engine: ``fairness_overtaken`` and so on."""


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """How far a request may fall behind first come, first served. Every limit is hard.

    Attributes
    ----------
    overtaken : int
        Requests of the same priority that arrived later and may join before it.
    steps : int
        Steps after its turn came from which on nobody who arrived later joins before it. Its turn comes when as many
        requests have joined as were ahead of it when it arrived.
    held : int
        Steps in a row for which a place may stay empty while requests wait, so that several join at once.
    seconds : float
        The same as `steps` and `held`, in seconds; no limit unless one is given, because a step may take milliseconds
        or seconds.

    Raises
    ------
    UnsupportedOptionError
        A limit is no number, or below zero; with zero nobody is overtaken, nobody whose turn has come, or no place
        stays empty.
    """

    overtaken: int = 64
    steps: int = 2048
    held: int = 64
    seconds: float = math.inf

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            kinds = (int, float) if limit.name == "seconds" else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool) or not value >= 0:
                whole = "a number" if limit.name == "seconds" else "a whole number"
                raise UnsupportedOptionError(
                    f"{PREFIX}{limit.name}={value!r} is not possible.", f"Give {whole} that is not below zero."
                )

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Fairness:
        """Read the limits out of an engine's options, and the environment for those that are not given.

        Parameters
        ----------
        given : mapping of str to object
            Values by option name, numbers or how they are written; ``None`` counts as not given, other names are
            ignored.
        """
        chosen = {}
        for limit in fields(cls):
            name = PREFIX + limit.name
            value = given.get(name)
            if value is None:
                name = ENV_PREFIX + name.upper()
                value = os.environ.get(name)
            if value is not None:
                chosen[limit.name] = _number(name, value, float if limit.name == "seconds" else int)
        return cls(**chosen)


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError as error:
        raise UnsupportedOptionError(f"{name}={value!r} is not a number.") from error


OPTIONS: Final = tuple(PREFIX + limit.name for limit in fields(Fairness))
"""Their names."""
