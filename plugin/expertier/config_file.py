"""A file of options: what ``expertier plan --apply`` writes and both adapters read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from expertier.errors import ConfigFileError

SCHEMA: Final = "expertier-config/1"
_ABOUT: Final = frozenset({"schema", "model", "fingerprint", "expected"})


def write_config(path: Path, options: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write options.

    Parameters
    ----------
    path : Path
        JSON file.
    options : mapping of str to object
        Options by name.
    about : mapping of str to object
        For people: ``model``, ``fingerprint``, ``expected``. Nobody reads them back.

    Raises
    ------
    ConfigFileError
        It cannot be written.
    """
    data = {"schema": SCHEMA, **about, "options": dict(options)}
    try:
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigFileError(f"{path} cannot be written: {error.strerror}.", "Name another file.") from error


def read_config(path: Path) -> dict[str, Any]:
    """Read the options in a file.

    Raises
    ------
    ConfigFileError
        There is no such file, it is not JSON, or not of this form.
    """
    remedy = "Write one: expertier plan MODEL --apply FILE."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigFileError(f"The file of options {path} cannot be read: {error.strerror}.", remedy) from error
    except ValueError as error:
        raise ConfigFileError(f"The file of options {path} is not JSON: {error}.", remedy) from error
    if not isinstance(data, dict) or not isinstance(data.get("options"), dict):
        raise ConfigFileError(f'{path} holds no options: it must be an object with the key "options".', remedy)
    if data.get("schema", SCHEMA) != SCHEMA:
        raise ConfigFileError(f"{path} is of the form {data['schema']!r}, this Expertier reads {SCHEMA!r}.", remedy)
    unknown = sorted(set(data) - _ABOUT - {"options"})
    if unknown:
        raise ConfigFileError(f"{path} has the unknown key {unknown[0]!r}.", 'Options go below "options".')
    options: dict[str, Any] = data["options"]
    return options
