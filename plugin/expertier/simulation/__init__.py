"""Replaying recorded routes through any pool, policy and prefetch, with a timing model and the bounds beside it."""

from expertier.simulation.belady import belady
from expertier.simulation.events import Events, load_events
from expertier.simulation.replay import replay
from expertier.simulation.result import Replay
from expertier.simulation.timing import Timing

__all__ = ["Events", "Replay", "Timing", "belady", "load_events", "replay"]
