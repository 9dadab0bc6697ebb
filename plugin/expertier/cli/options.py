"""Flags made from the one table of options, and the one place where refusals become messages."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Literal

import typer

from expertier.config import ENV_PREFIX, OffloadOptions
from expertier.errors import ExpertierError, UnsupportedOptionError

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


def offload_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag per field of :class:`OffloadOptions`; it receives them as the argument ``options``.

    A flag that is not given is ``None``: the environment and then the default decide. A command that has a parameter of
    the same name means something else by that flag, and keeps it.
    """
    own_names = inspect.signature(function).parameters.keys()
    hints = typing.get_type_hints(OffloadOptions)
    names = [option.name for option in fields(OffloadOptions) if option.name not in own_names]
    flags = []
    for option in fields(OffloadOptions):
        if option.name in own_names:
            continue
        default = "" if option.default in (None, MISSING) else f" [default: {option.default}]"
        text = f"{option.metadata['help']}{default} [env: {ENV_PREFIX}{option.name.upper()}]"
        name = "--" + option.name.replace("_", "-")
        flags.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=typing.Annotated[
                    _flag_type(hints[option.name]) | None,
                    typer.Option(name, help=_plain(text), rich_help_panel="Offloading", show_default=False),
                ],
            )
        )

    @functools.wraps(function)
    def command(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in names}
        function(options=OffloadOptions.from_mapping(chosen), **given)

    signature = inspect.signature(function, eval_str=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in signature.parameters.values()
        if parameter.name != "options"
    ]
    parameters = [*own, *flags]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def refuse_beside(flag: str, **others: Any) -> None:
    """Refuse flags that mean nothing beside `flag`; those that were not given are ``None``.

    Raises
    ------
    UnsupportedOptionError
        With the first of them.
    """
    if given := _first_given(others):
        raise UnsupportedOptionError(f"{flag} cannot be combined with {given}.", "Leave one of them out.")


def refuse_without(flag: str, **others: Any) -> None:
    """Refuse flags that mean nothing without `flag`; those that were not given are ``None``.

    Raises
    ------
    UnsupportedOptionError
        With the first of them.
    """
    if given := _first_given(others):
        raise UnsupportedOptionError(f"{given} needs {flag}.", f"Add {flag}, or leave it out.")


def _first_given(flags: Mapping[str, Any]) -> str | None:
    return next((f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None), None)


def _flag_type(hint: Any) -> Any:
    """Type of a flag: amounts such as ``str | int`` are text here and read where they are used."""
    if typing.get_origin(hint) is Literal:
        return hint
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not types.NoneType]
    return str if str in kinds else kinds[0]


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def reported(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command refuses into one message and exit code 2, and an interrupt into one line and 130.

    With ``--json`` a refusal is a JSON object on stdout, too.
    """

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> None:
        try:
            function(*args, **given)
        except ExpertierError as error:
            if given.get("as_json"):
                kind = type(error).__name__
                print_json({"error": {"kind": kind, "problem": error.problem, "remedy": error.remedy}})
            print(f"expertier: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_REFUSED) from None
        except KeyboardInterrupt:
            print("\nInterrupted." if sys.stderr.isatty() else "Interrupted.", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output (head, less) has seen enough; Python must not complain about it at exit, either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return command


def print_json(value: Any) -> None:
    """Print a value, dataclasses included, as JSON that any parser reads (no NaN)."""
    print(_as_json(value), flush=True)


def write_json(path: Path, value: Any) -> None:
    """Write what :func:`print_json` prints."""
    path.write_text(_as_json(value) + "\n", encoding="utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(_finite(value), indent=1, default=str)


def _finite(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value
