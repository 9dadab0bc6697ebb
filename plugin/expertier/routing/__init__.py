"""Predicting routes. A prediction only moves bytes; the router stays the authority."""

from expertier.routing.ahead import AheadLoader
from expertier.routing.gate import GainGate
from expertier.routing.lookahead import Lookahead
from expertier.routing.predictor import Forecast, RoutePredictor
from expertier.routing.profile import ProfileKeeper, RoutingProfile
from expertier.routing.recorder import TraceRecorder
from expertier.routing.sequences import Span
from expertier.routing.trace import Trace, TraceHeader, TraceLayer, read_trace

__all__ = [
    "AheadLoader",
    "Forecast",
    "GainGate",
    "Lookahead",
    "ProfileKeeper",
    "RoutePredictor",
    "RoutingProfile",
    "Span",
    "Trace",
    "TraceHeader",
    "TraceLayer",
    "TraceRecorder",
    "read_trace",
]
