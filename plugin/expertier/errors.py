"""Every refusal has a name and says what to do.

All errors raised on purpose derive from :class:`ExpertierError`. The command line prints ``str(error)`` without a
traceback, so a message must stand on its own: what is wrong, where, and the way out.
"""

from __future__ import annotations


class ExpertierError(Exception):
    """Base of every error Expertier raises on purpose.

    Parameters
    ----------
    problem : str
        What is wrong, in one sentence.
    remedy : str, optional
        What the user can do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.problem = problem
        self.remedy = remedy

    def as_body(self) -> dict[str, dict[str, str]]:
        """Return the error as servers answer it: ``{"error": {"type", "message", "remedy"}}``."""
        return {"error": {"type": type(self).__name__, "message": self.problem, "remedy": self.remedy}}


class ModelNotFoundError(ExpertierError, FileNotFoundError):
    """The model path does not exist or is not a readable file."""

    __str__ = ExpertierError.__str__


class ModelFormatError(ExpertierError):
    """The model file is truncated, corrupt or not of a supported format."""


class NotMoEError(ExpertierError):
    """The model has no routed experts: there is nothing to offload."""


class UnsupportedModelError(ExpertierError):
    """The model is a mixture of experts of a kind that cannot be managed."""


class UnsupportedOptionError(ExpertierError):
    """An engine option that cannot be combined with Expertier."""


class UnsupportedEngineError(ExpertierError):
    """The engine is missing or its version is not one that was verified."""


class BudgetError(ExpertierError, ValueError):
    """The budget cannot be parsed, is below the smallest working set, or exceeds the machine."""


class ExpertLoadError(ExpertierError):
    """Reading an expert failed; the step was abandoned and produced no output."""


class SidecarError(ExpertierError):
    """The sidecar file is damaged, belongs to another model, or cannot be written."""


class ProfileError(ExpertierError):
    """The profile of earlier runs is damaged, of another model, or cannot be written."""


class ManagerClosedError(ExpertierError):
    """The offload manager was used after it was closed."""


class VirtualExpertsError(ExpertierError):
    """Virtual experts were asked for in a way, or of a model, in which they are not possible."""


class RouterScoresError(ExpertierError):
    """A router's scores cannot be ranked."""


class TraceError(ExpertierError):
    """A trace of routes cannot be used; the subclasses say why."""


class TraceFormatError(TraceError):
    """The file is not a trace, cannot be read or written, or contradicts itself."""


class TraceVersionError(TraceError):
    """The trace was written by a newer Expertier."""


class TraceTruncatedError(TraceError):
    """The trace was not closed: its recorder was killed, or the file was cut."""


class TraceChecksumError(TraceError):
    """Bytes of the trace have changed since it was written."""


class TraceMismatchError(TraceError):
    """The trace is of another model."""


class TraceTooShortError(TraceError):
    """The trace has too few tokens for what was asked."""


class PredictorError(ExpertierError):
    """A trained route predictor cannot be used; the subclasses say why."""


class PredictorMissingError(PredictorError):
    """A predictor was asked for by name that is unknown or was not trained."""


class PredictorFormatError(PredictorError):
    """The files are not a predictor, cannot be read or written, or contradict themselves."""


class PredictorVersionError(PredictorError):
    """The predictor was trained with a newer Expertier."""


class PredictorMismatchError(PredictorError):
    """The predictor was trained for another model."""


class RoutingDemandError(ExpertierError):
    """A summary of routes, or the speeds measured beside it, cannot be used for planning."""


class ConfigFileError(ExpertierError):
    """A file of options is missing, is not JSON, or holds what options cannot be."""


class QualityBudgetError(ExpertierError, ValueError):
    """The quality budget cannot be read, contradicts another option, or cannot be kept within the memory budget."""

    __str__ = ExpertierError.__str__


class QualityProfileError(ExpertierError):
    """There is no quality profile, it is damaged, or it belongs to another model, version or policy."""


class RequestError(ExpertierError, ValueError):
    """A request that cannot be served as asked: an empty prompt, an option that is not possible."""

    __str__ = ExpertierError.__str__


class RequestTooLongError(RequestError):
    """The prompt leaves no room for output in the context."""


class RequestCancelledError(ExpertierError):
    """The request was cancelled, or its client went away."""


class ContextFullError(ExpertierError):
    """The KV memory has no room for the next token of a request, though it is the only one."""
