"""What an adapter does with a predictor, in simulated time and through its own code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from expertier.errors import UnsupportedOptionError
from expertier.routing.gate import GainGate
from expertier.routing.lookahead import Lookahead
from expertier.routing.predictor import HORIZONS, Forecast, RoutedModel
from expertier.routing.recorder import TraceRecorder
from expertier.routing.trace import read_trace
from expertier.simulation import Events, Timing, load_events
from expertier.simulation.loads import AdapterLoads
from expertier.simulation.prefetch import SimulatedManager, TimedReplay, replay_timed
from support.predictors import FixedPredictor
from support.traces import header, skewed_routes

TIMING = Timing(bandwidth=2e9, compute=0.02, latency=1e-4)
SHARE = 0.3


def recorded(tokens: int, *, prompt: int = 0, ids: bool = True, hidden: int = 0) -> Events:
    """One request: a prompt in one step, then tokens one by one. Token ids say where a token stands."""
    shape = header(4, 16, 2, slot_bytes=(3 << 20,), tokens=ids, hidden_size=hidden)
    routes = skewed_routes(shape, prompt + tokens)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace"
        with TraceRecorder(path, shape) as recorder:
            starts = [0, *range(prompt, prompt + tokens)] if prompt else range(tokens)
            for start in starts:
                rows = routes[start : start + 1] if start or not prompt else routes[:prompt]
                places = np.arange(start, start + len(rows))
                phase = "prefill" if len(rows) > 1 else "decode"
                recorder.begin_step(
                    phase,
                    requests=np.zeros(len(rows), int),
                    positions=places,
                    **({"token_ids": places} if ids else {}),
                )
                for place, layer in enumerate(shape.layers):
                    recorder.record(layer.layer, rows[:, place])
                recorder.end_step()
        return load_events(read_trace(path))


class Told(FixedPredictor):
    """Knows the trace: says what a token will use, or exactly what it will not."""

    def __init__(self, events: Events, *, wrong: bool = False) -> None:
        model = RoutedModel.of_trace(events.header)
        super().__init__(model, np.zeros(model.shape))
        steps = len(events.phase)
        self.uses = np.zeros((steps + 1, *model.shape), np.float32)
        for event in range(len(events)):
            self.uses[events.step[event], events.layer[event], events.routes(event)] = 1.0
        self.first = int(events.tokens[0]) - 1
        if wrong:
            self.uses = 1.0 - self.uses

    def forecast(self, sequence: int, tokens: np.ndarray, *, start: int | None = None) -> Forecast:
        step = int(tokens[-1]) - self.first
        self.chances = self.uses[step]
        super().forecast(sequence, tokens, start=start)
        return Forecast(now=self.uses[step], soon=np.stack([self.uses[step + 1]] * len(HORIZONS)))


def run(events: Events, policy: str = "lfu", predictor: Told | None = None, **options: object) -> TimedReplay:
    budget = int(SHARE * events.header.total_bytes)

    def loads(manager: SimulatedManager) -> AdapterLoads:
        clock = lambda: manager.disk.now  # noqa: E731
        return AdapterLoads(events, manager, predictor=predictor, clock=clock, **options)  # type: ignore[arg-type]

    return replay_timed(events, policy, budget, TIMING, loads=None if predictor is None else loads)


def test_a_forecast_alone_saves_loads_and_loading_by_it_saves_waiting() -> None:
    events = recorded(200)
    plain, listening = run(events, "predictive"), run(events, "predictive", Told(events), load=False)
    loading = run(events, "predictive", Told(events), gate=GainGate("on"))
    assert listening.misses < 0.9 * plain.misses
    assert listening.prefetches == 0
    assert loading.stall_seconds < 0.8 * listening.stall_seconds
    assert loading.ahead > 2 * loading.misses
    for replay in (plain, listening, loading):
        assert replay.ready_hits + replay.late + replay.misses == len(events.set_experts)


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("policy", ["lfu", "predictive"])
def test_a_harmful_predictor_costs_less_than_two_percent_after_64_tokens(
    policy: str, mode: Literal["auto", "on"]
) -> None:
    """Also without trials by step times: what was loaded for nothing is enough to know."""
    short, long = recorded(64), recorded(600)
    plain = [run(events, policy).seconds for events in (short, long)]
    harmed = [run(events, policy, Told(events, wrong=True), gate=GainGate(mode)).seconds for events in (short, long)]
    assert harmed[1] - harmed[0] < 1.02 * (plain[1] - plain[0])


def test_a_prompt_streams_and_what_is_decoded_after_it_is_predicted() -> None:
    events = recorded(20, prompt=30)
    predictor = Told(events)
    found = run(events, "predictive", predictor, gate=GainGate("on"))
    assert found.prefetches >= 2 * 16 - SHARE * 64, "layers of the prompt were loaded whole"
    assert predictor.sequences == {0: list(range(50))}
    assert len(predictor.observed) == 20 * 4


def test_what_a_trace_lacks_is_said() -> None:
    events = recorded(4, ids=False)
    manager = SimulatedManager(events, events.header.total_bytes, TIMING, policy="lfu")
    with pytest.raises(UnsupportedOptionError, match="no token ids"):
        AdapterLoads(events, manager, predictor=Told(recorded(4)))
    gates = {layer: np.zeros((16, 8), np.float32) for layer in range(4)}
    lookahead = Lookahead(gates=gates, norms={}, top_k=dict.fromkeys(gates, 2))
    with pytest.raises(UnsupportedOptionError, match="no inputs of routers"):
        AdapterLoads(events, manager, lookahead=lookahead)
