"""Who runs together: requests whose tokens share experts, within a hard bound on unfairness."""

from expertier.scheduling.admission import Admission, AdmissionStats
from expertier.scheduling.base import Batcher, Round
from expertier.scheduling.domains import ORACLE, KnownDomains
from expertier.scheduling.fairness import Fairness
from expertier.scheduling.paths import PathBook, resident_experts
from expertier.scheduling.registry import BATCHERS, CONTROL, make_batcher
from expertier.scheduling.together import Together
from expertier.scheduling.worth import Worth

__all__ = [
    "BATCHERS",
    "CONTROL",
    "ORACLE",
    "Admission",
    "AdmissionStats",
    "Batcher",
    "Fairness",
    "KnownDomains",
    "PathBook",
    "Round",
    "Together",
    "Worth",
    "make_batcher",
    "resident_experts",
]
