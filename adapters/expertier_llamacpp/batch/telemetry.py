"""What the batch engine counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class EngineStats:
    """Counters of a batch engine since it was made.

    Attributes
    ----------
    running, waiting : int
        Requests now.
    kv_tokens, kv_capacity : int
        Cells of the KV memory in use, what finished requests left behind included, and all.
    steps, tokens, sequence_steps : int
        Steps; tokens they computed; sequences that took part in them, summed.
    reused_tokens : int
        Prompt tokens whose keys and values were there already.
    shortened_steps : int
        Steps that were tried again with fewer tokens because their experts did not fit the budget.
    set_back : int
        Times a running request had to wait again because the KV memory was full.
    failed_steps : int
        Steps whose requests failed.
    """

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    kv_capacity: int = 0
    steps: int = 0
    tokens: int = 0
    sequence_steps: int = 0
    reused_tokens: int = 0
    shortened_steps: int = 0
    set_back: int = 0
    failed_steps: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the counters for JSON."""
        return asdict(self)
