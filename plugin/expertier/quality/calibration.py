"""Measures what biases cost at several memory budgets, and chooses where to measure next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from expertier.errors import QualityProfileError
from expertier.quality.evaluation import Evaluation, Reference, Sample, TeacherForced, evaluate
from expertier.quality.profile import Point
from expertier.quality.statistics import LEAST_TEXTS

TARGETS = (0.005, 0.01, 0.02, 0.05)
"""Increases of the perplexity around which biases are chosen."""

_FIRST, _LEAST, _MOST = 0.1, 0.0125, 3.2
_FLAT = 0.03  # two settings whose loads differ less are the same


@runtime_checkable
class Adjustable(TeacherForced, Protocol):
    """A session whose memory budget and stand-ins can be changed between steps."""

    def resize(self, budget: int) -> None:
        """Change the memory budget."""

    def set_virtual(self, bias: float, protect: int) -> None:
        """Change what residency is worth (0 is exact) and how many first experts are never replaced."""


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """What is to be measured.

    Attributes
    ----------
    budgets : sequence of int
        Memory budgets in bytes.
    total_bytes : int
        What all experts take.
    protects : sequence of int
        Numbers of first experts that are never replaced.
    points : int
        Settings per memory budget and number of protected experts.
    """

    budgets: Sequence[int]
    total_bytes: int
    protects: Sequence[int] = (0,)
    points: int = 5

    @property
    def passes(self) -> int:
        """At most so many times all texts are read, the exact model included."""
        return 1 + len(self.budgets) * (1 + len(self.protects) * self.points)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What came out: points, and the evaluations behind them in the same order."""

    points: tuple[Point, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(points=self.points + other.points, evaluations=self.evaluations + other.evaluations)


def check_texts(texts: Sequence[Sample]) -> None:
    """Refuse too few texts.

    Raises
    ------
    QualityProfileError
        Fewer than an interval needs.
    """
    if len(texts) < LEAST_TEXTS:
        raise QualityProfileError(
            f"{len(texts)} texts promise nothing: at least {LEAST_TEXTS} are needed, and some dozens are better.",
            "Name more files with --text; a JSON list holds many texts.",
        )


def calibrate(
    session: Adjustable,
    reference: Reference,
    plan: CalibrationPlan,
    advance: Callable[[int], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measure curves of quality against bias.

    Parameters
    ----------
    session : Adjustable
        A model loaded with a finite bias.
    reference : Reference
        The exact model on the texts.
    plan : CalibrationPlan
        What to measure.
    advance, tell : callable, optional
        Told after every token, and what is measured now.
    """
    points: list[Point] = []
    evaluations: list[Evaluation] = []

    def measure(budget: int, bias: float, protect: int) -> Point:
        share = budget / plan.total_bytes
        tell(f"{100 * share:.0f} % resident, bias {bias:.3g}" + (f", first {protect} protected" if protect else ""))
        session.set_virtual(bias, protect)
        found = evaluate(session, reference, warm_up=reference.texts[-1].tokens, advance=advance)
        points.append(point_of(found, share=share, bias=bias, protect=protect))
        evaluations.append(found)
        return points[-1]

    for budget in sorted(set(plan.budgets), reverse=True):
        session.resize(budget)
        exact = measure(budget, 0.0, 0)
        if exact.kl.middle > 0:
            raise QualityProfileError(
                "The model gave other logits at bias 0 than when it was read first, so nothing can be compared.",
                "Run with one thread, and report this.",
            )
        for protect in plan.protects:
            curve = [exact]
            while len(curve) <= plan.points:
                bias = next_bias(curve)
                if bias is None:
                    break
                curve.append(measure(budget, bias, protect))
    return Calibration(points=tuple(points), evaluations=tuple(evaluations))


def point_of(found: Evaluation, *, share: float, bias: float, protect: int, hard: bool = False) -> Point:
    """Sum an evaluation up."""
    return Point(
        share=share,
        bias=bias,
        protect=protect,
        hard=hard,
        increase=found.perplexity_increase(),
        kl=found.kl_interval(),
        agreement=found.agreement,
        loads_per_token=found.loads_per_token,
        bytes_per_token=found.bytes_per_token,
        substituted=tuple(found.substituted.tolist()),
    )


def next_bias(curve: Sequence[Point], targets: Sequence[float] = TARGETS) -> float | None:
    """Choose where to measure next.

    Outwards until the largest target is exceeded or loads stop falling, then where a target is crossed over the largest
    drop in loads.

    Parameters
    ----------
    curve : sequence of Point
        What was measured, bias 0 included.

    Returns
    -------
    float or None
        ``None`` when nothing is left to learn.
    """
    known = sorted(curve, key=lambda point: point.bias)
    last = known[-1]
    if not last.bias:
        return _FIRST if last.loads_per_token > 0 else None
    falling = known[-2].loads_per_token - last.loads_per_token > _FLAT * known[0].loads_per_token
    if last.increase.high < max(targets) and last.bias < _MOST and falling:
        return 2 * last.bias
    best, drop = None, _FLAT * known[0].loads_per_token
    for below, above in itertools.pairwise(known):
        crossed = any(below.increase.high <= target < above.increase.high for target in targets)
        saved = below.loads_per_token - above.loads_per_token
        if crossed and saved > drop and above.bias > max(2 * _LEAST, 1.1 * below.bias):
            drop = saved
            best = (below.bias, above.bias)
    if best is None:
        return None
    return math.sqrt(best[0] * best[1]) if best[0] else best[1] / 2
