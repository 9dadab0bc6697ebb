"""The other end of the runner's pipe: how an engine's worker takes its job and hands in its record."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from expertier.errors import ExpertierError


def answer_job(measure: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Read a job from stdin, measure, write the record to stdout; all else that is printed goes to stderr.

    Parameters
    ----------
    measure : callable
        Takes the job, returns the fields of :class:`expertier.comparison.records.Figures`. An ExpertierError makes the
        run one that was refused.
    """
    job = json.loads(sys.stdin.read())
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print where they like
    try:
        record: dict[str, Any] = {"status": "ok", "figures": measure(job)}
    except ExpertierError as error:
        record = {"status": "refused", "reason": f"{type(error).__name__}: {error}"}
    with answer:
        json.dump(record, answer)
