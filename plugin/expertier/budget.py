"""Reads and writes amounts of memory the way people do: ``8GiB``, ``500MB``, ``25%``, ``auto``."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from expertier.errors import BudgetError

_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_AMOUNT: Final = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,12})?)[ \t]*([A-Za-z]*|%)")
_REMEDY: Final = "Write e.g. 8GiB, 500MB, 25% (of all experts), a number of bytes, or auto."


def parse_budget(value: str | int, total_expert_bytes: int) -> int | None:
    """Turn what a user wrote into bytes.

    Parameters
    ----------
    value : str or int
        Bytes, or a number with a unit (``KB``, ``MB``, ``GB``, ``TB`` are powers of 1000; ``KiB``, ``MiB``, ``GiB``,
        ``TiB`` of 1024; upper or lower case), or a percentage of `total_expert_bytes`, or ``auto``.
    total_expert_bytes : int
        Bytes of all routed experts of the model.

    Returns
    -------
    int or None
        Bytes, rounded down; None for ``auto``.

    Raises
    ------
    BudgetError
        Not an amount, not above zero, or more than 100 %.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BudgetError(f"The budget {value!r} is not an amount of memory.", _REMEDY)
    if isinstance(value, int):
        return _positive(value, value)
    text = value.strip()
    if text.lower() == "auto":
        return None
    match = _AMOUNT.fullmatch(text)
    if match is None:
        if re.fullmatch(r"-\s*[0-9].*", text):
            raise BudgetError(f"The budget '{value}' is negative.", _REMEDY)
        raise BudgetError(f"The budget '{value}' is not an amount of memory.", _REMEDY)
    number, unit = Fraction(match[1]), match[2].lower()
    if unit == "%":
        if number > 100:
            raise BudgetError(f"The budget '{value}' is more than all experts.", "Write at most 100%.")
        return _positive(int(number * total_expert_bytes / 100), value)
    if unit not in _UNITS:
        raise BudgetError(f"The budget '{value}' has the unknown unit '{match[2]}'.", _REMEDY)
    return _positive(int(number * _UNITS[unit]), value)


def _positive(amount: int, written: str | int) -> int:
    if amount <= 0:
        raise BudgetError(f"The budget '{written}' is not above zero bytes.", _REMEDY)
    return amount


def format_bytes(amount: int) -> str:
    """Write an amount of memory for people, in powers of 1024.

    Parameters
    ----------
    amount : int
        Bytes; may be negative (a difference).

    Returns
    -------
    str
        E.g. ``512 B``, ``1.50 GiB``.
    """
    size = abs(amount)
    sign = "-" if amount < 0 else ""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _UNITS[unit.lower()]
        # Already at the value that would be shown as 1024.00 of the smaller unit.
        if size >= scale - scale // 1024 // 200:
            return f"{sign}{size / scale:.2f} {unit}"
    return f"{sign}{size} B"
