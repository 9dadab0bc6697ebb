"""Predicting routes. A prediction only moves bytes; the router stays the authority."""

from expertier.routing.ahead import AheadLoader
from expertier.routing.gate import GainGate
from expertier.routing.lookahead import Lookahead

__all__ = ["AheadLoader", "GainGate", "Lookahead"]
