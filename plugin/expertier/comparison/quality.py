"""What lossy arms of a comparison lost: their logits against those of an exact arm at the same positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.comparison.records import ArmRecord, Figures, QualityFigures, Run
from expertier.errors import ExpertierError
from expertier.quality.budget import parse_quality_budget
from expertier.quality.evaluation import compare
from expertier.quality.statistics import bootstrap

_JOB = "logits"
_COLUMNS = 2  # before the logits of a row: number of the text, and the token that follows


def is_lossy(settings: Mapping[str, Any]) -> bool:
    """Whether an Expertier arm with these options may compute something else than stock."""
    if settings.get("virtual_hard") == "on" or float(settings.get("virtual_bias") or 0) > 0:
        return True
    return parse_quality_budget(settings.get("quality_budget")).kind != "exact"


def wants_logits(job: Mapping[str, Any]) -> bool:
    """Whether a comparison has lossy arms, so that its workers' jobs say where logits go."""
    return bool(job.get(_JOB))


class DecodedLogits:
    """Writes the logits of every decoded token; a worker has one, and it does nothing unless its job says where to.

    Parameters
    ----------
    job : mapping
        With ``logits``, a path, where a comparison has lossy arms.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._file = open(job[_JOB], "wb") if wants_logits(job) else None  # noqa: SIM115 - closed by close()

    def add(self, text: int, following: int, logits: NDArray[np.float32]) -> None:
        """Note what the model said before a token came."""
        if self._file is not None:
            if not self._file.tell():
                self._file.write(np.int64(_COLUMNS + len(logits)).tobytes())
            self._file.write(np.array([text, following], np.float32).tobytes())
            self._file.write(logits.tobytes())

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self._file.close()


class LogitsFolder:
    """Where the workers of a comparison leave their logits, and what becomes of them.

    Parameters
    ----------
    folder : Path or None
        ``None`` if no arm is lossy: nothing is written then.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def job(self, arm: ArmRecord, repeat: int) -> dict[str, Any]:
        """What a worker's job gets for a run."""
        return {} if self._folder is None else {_JOB: str(self._path(arm, repeat))}

    def done(self, arm: ArmRecord, run: Run) -> None:
        """Keep what will be compared: all of lossy arms, of the others the first repeat."""
        if self._folder is not None and (run.status != "ok" or (run.repeat and not arm.lossy)):
            self._path(arm, run.repeat).unlink(missing_ok=True)

    def judged(self, arms: Sequence[ArmRecord]) -> tuple[ArmRecord, ...]:
        """Give every run of a lossy arm its quality.

        The exact arm it is compared with has the same kernels if there is one, and is Expertier's own if it can be:
        its logits are stock's.
        """
        return tuple(replace(arm, runs=tuple(self._judge(arm, run, arms) for run in arm.runs)) for arm in arms)

    def _judge(self, arm: ArmRecord, run: Run, arms: Sequence[ArmRecord]) -> Run:
        if not arm.lossy or run.figures is None or self._folder is None:
            return run
        kernels = run.figures.kernels
        exact = [
            (other.limit != arm.limit, not other.ours, path, first.figures)
            for other in arms
            for first in other.runs[:1]
            if not other.lossy and first.figures is not None and first.figures.kernels == kernels
            for path in [self._path(other, first.repeat)]
            if path.is_file()
        ]
        own = self._path(arm, run.repeat)
        if not exact or not own.is_file():
            return run
        _, _, path, figures = min(exact, key=lambda found: found[:2])
        return replace(run, figures=replace(run.figures, quality=judge(own, path, figures)))

    def _path(self, arm: ArmRecord, repeat: int) -> Path:
        assert self._folder is not None
        name = "".join(letter if letter.isalnum() or letter in "-.%" else "_" for letter in f"{arm.limit}-{arm.key}")
        return self._folder / f"{name}-{repeat}.logits"


def judge(lossy: Path, exact: Path, figures: Figures) -> QualityFigures:
    """Compare two files of logits, position by position.

    Parameters
    ----------
    lossy, exact : Path
        What :class:`DecodedLogits` wrote.
    figures : Figures
        Of the exact run; its loads are the measure.

    Raises
    ------
    ExpertierError
        They are not of the same tokens.
    """
    ours, theirs = _read(lossy), _read(exact)
    if ours.shape != theirs.shape or not np.array_equal(ours[:, :_COLUMNS], theirs[:, :_COLUMNS]):
        raise ExpertierError("Two arms wrote logits of different tokens.", "Compare again, and report this.")
    texts = ours[:, 0].astype(np.int64)
    nll, exact_nll, kl, agreed = np.zeros((4, len(ours)))
    for position, (here, there) in enumerate(zip(ours, theirs, strict=True)):
        found = compare(here[_COLUMNS:], there[_COLUMNS:], int(here[1]))
        nll[position], exact_nll[position], kl[position], agreed[position] = found
    gained = np.asarray(np.bincount(texts, nll - exact_nll), np.float64)
    counts = np.asarray(np.bincount(texts), np.float64)
    present = counts > 0
    return QualityFigures(
        tokens=len(ours),
        cross_entropy=float(nll.mean()),
        exact_cross_entropy=float(exact_nll.mean()),
        increase=bootstrap(gained[present], counts[present]).map(np.expm1),
        kl=float(kl.mean()),
        agreement=float(agreed.mean()),
        exact_read_bytes_per_token=figures.offload.read_bytes_per_token if figures.offload is not None else None,
    )


def _read(path: Path) -> NDArray[np.float32]:
    with path.open("rb") as file:
        (width,) = np.fromfile(file, np.int64, 1)
        return np.fromfile(file, np.float32).reshape(-1, int(width))
