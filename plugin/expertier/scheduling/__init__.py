"""Who runs together: requests whose tokens share experts, within a hard bound on unfairness."""

from expertier.scheduling.admission import Admission, AdmissionStats, Fairness
from expertier.scheduling.base import Batcher, Round
from expertier.scheduling.paths import PathBook, resident_experts
from expertier.scheduling.registry import BATCHERS, CONTROL, make_batcher
from expertier.scheduling.worth import Worth

__all__ = [
    "BATCHERS",
    "CONTROL",
    "Admission",
    "AdmissionStats",
    "Batcher",
    "Fairness",
    "PathBook",
    "Round",
    "Worth",
    "make_batcher",
    "resident_experts",
]
