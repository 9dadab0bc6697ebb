"""Who runs together: requests whose tokens share experts, within a hard bound on unfairness."""

from expertier.scheduling.admission import Admission, AdmissionStats, Fairness
from expertier.scheduling.base import Batcher, Round
from expertier.scheduling.paths import PathBook
from expertier.scheduling.registry import BATCHERS, make_batcher

__all__ = ["BATCHERS", "Admission", "AdmissionStats", "Batcher", "Fairness", "PathBook", "Round", "make_batcher"]
