"""What a lossy mode costs: measured on text, promised as a budget, watched while serving."""

from expertier.quality.evaluation import Evaluation, Reference, Sample, TeacherForced, TextFigures, evaluate, samples
from expertier.quality.statistics import Interval

__all__ = ["Evaluation", "Interval", "Reference", "Sample", "TeacherForced", "TextFigures", "evaluate", "samples"]
