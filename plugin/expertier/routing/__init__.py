"""Predicting routes. A prediction only moves bytes; the router stays the authority."""

from expertier.routing.ahead import AheadLoader
from expertier.routing.gate import GainGate
from expertier.routing.lookahead import Lookahead
from expertier.routing.profile import ProfileKeeper, RoutingProfile
from expertier.routing.recorder import TraceRecorder
from expertier.routing.trace import Trace, TraceHeader, TraceLayer, read_trace

__all__ = [
    "AheadLoader",
    "GainGate",
    "Lookahead",
    "ProfileKeeper",
    "RoutingProfile",
    "Trace",
    "TraceHeader",
    "TraceLayer",
    "TraceRecorder",
    "read_trace",
]
