"""What the simulator says about a trace is what the engine did while it was recorded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertier.catalog.gguf import read_layout, read_tensor
from expertier.errors import TraceMismatchError
from expertier.manager import OffloadManager
from expertier.routing import ahead as ahead_module
from expertier.routing.gate import GainGate
from expertier.routing.predictor import Forecast, RoutedModel
from expertier.routing.trace import read_trace
from expertier.simulation import load_events, replay
from expertier.simulation.loads import AdapterLoads
from support.predictors import FixedPredictor
from support.tiny_gguf import TinySpec

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before libgomp is loaded
llama_cpp = pytest.importorskip("llama_cpp")
Llama = pytest.importorskip("expertier_llamacpp").Llama
llama_module = pytest.importorskip("expertier_llamacpp.llama")
pytestmark = pytest.mark.engine
TinyModel = Callable[[TinySpec], Path]

SPEC = TinySpec(layers=4, experts=16, top_k=2, skew=0.7)
# Experts that are no page multiples: how much is read differs from expert to expert.
UNEVEN = TinySpec(layers=3, experts=12, top_k=3, hidden=96, feed_forward=160, expert_type="Q4_0")
TOKENS = [int(token) for token in np.random.default_rng(5).integers(3, 300, 60)]


def decode(model: Path, trace: Path | None, *, budget: str, policy: str = "lfu", **options: object) -> Any:
    """Feed tokens one by one, without anything whose outcome depends on the moment. The caller closes the model."""
    own = {} if trace is None else {"expert_trace": str(trace)}
    llama = Llama(
        str(model),
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        logits_all=True,
        expert_budget=budget,
        expert_policy=policy,
        expert_lookahead="off",
        **own,
        **options,
    )
    llama.offload.config = replace(llama.offload.config, fill=False)
    for token in TOKENS:
        llama.eval([token])
    return llama


@pytest.mark.parametrize("policy", ["lfu", "lru", "lfru", "edge", "predictive"])
@pytest.mark.parametrize(("spec", "budget"), [(SPEC, "25%"), (SPEC, "50%"), (UNEVEN, "40%"), (SPEC, "90%")])
def test_hits_misses_and_bytes_are_exactly_the_engines(
    tiny_model: TinyModel, tmp_path: Path, spec: TinySpec, budget: str, policy: str
) -> None:
    llama = decode(tiny_model(spec), tmp_path / "trace", budget=budget, policy=policy)
    stats = llama.offload.stats()
    llama.close()
    found = replay(load_events(read_trace(tmp_path / "trace")), policy, stats.budget_bytes)
    assert found.tokens == stats.decode.tokens == len(TOKENS)
    assert (found.hits, found.requests) == (stats.decode.ready_hits + stats.decode.late, stats.decode.requests)
    assert found.misses.sum() == stats.decode.misses > 0
    assert found.bytes_read.sum() == stats.bytes_read


def test_with_a_predictor_the_policy_evicts_in_the_simulator_what_it_evicts_in_the_engine(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forecasts come from the tokens alone, so both hear the same."""
    monkeypatch.setattr(
        llama_module,
        "open_predictor",
        lambda option, catalog, *rest: HashPredictor.of(RoutedModel.of_catalog(catalog)),
    )
    monkeypatch.setattr(llama_module, "gate_mode", lambda lookahead, predictor: "off")
    monkeypatch.setattr(ahead_module, "_DEAR", np.inf)  # forecasts take a good part of a toy's step
    path = tmp_path / "trace"
    llama = decode(tiny_model(SPEC), path, budget="40%", policy="predictive", expert_trace_tokens="on")
    stats = llama.offload.stats()
    llama.close()
    events = load_events(read_trace(path))

    def forecasts(manager: OffloadManager) -> AdapterLoads:
        predictor = HashPredictor.of(RoutedModel.of_trace(events.header))
        return AdapterLoads(events, manager, predictor=predictor, gate=GainGate("off"), load=False)

    found = replay(events, "predictive", stats.budget_bytes, forecasts=forecasts)
    assert found.misses.sum() == stats.decode.misses
    assert found.bytes_read.sum() == stats.bytes_read
    assert found.misses.sum() != replay(events, "predictive", stats.budget_bytes).misses.sum(), "it was listened to"


class HashPredictor(FixedPredictor):
    """Says something else for every token, nothing of it bold enough to be found wrong soon."""

    @classmethod
    def of(cls, model: RoutedModel) -> HashPredictor:
        return cls(model, np.zeros(model.shape))

    def forecast(self, sequence: int, tokens: Any, *, start: int | None = None) -> Forecast:
        super().forecast(sequence, tokens, start=start)
        dice = np.random.default_rng(int(tokens[-1]))
        now = dice.uniform(0.1, 0.15, self.model.shape).astype(np.float32)
        return Forecast(now=now, soon=np.stack([now, 2 * now, 4 * now]))


@pytest.mark.parametrize("architecture", ["qwen3moe", "olmoe", "llama", "qwen2moe"])
def test_recorded_routes_and_weights_are_those_of_the_routers(
    tiny_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    """Redone in numpy from the recorded inputs of the routers."""
    model = tiny_model(TinySpec(architecture=architecture))
    path = tmp_path / "trace"
    decode(model, path, budget="50%", expert_trace_hidden=1, expert_trace_tokens="on").close()
    trace = read_trace(path)
    layouts = read_layout(model)
    checked = 0
    for block in trace.blocks():
        for call, hidden in zip(block.hidden_call.tolist(), block.hidden.astype(np.float32), strict=True):
            layer = trace.header.layers[block.call_layer[call]]
            gate = np.asarray(read_tensor(layouts, f"blk.{layer.layer}.ffn_gate_inp.weight"))
            logits = gate @ hidden
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            chosen = block.routes(call)[0].astype(int)
            start, stop = block.call_starts[call : call + 2]
            assert block.weights is not None
            assert np.allclose(block.weights[start:stop], chances[chosen], atol=0.01)
            # Half precision of the inputs may swap experts that are all but equal.
            assert chances[chosen].min() >= np.sort(chances)[-layer.top_k] - 0.01
            checked += 1
    assert checked == len(TOKENS) * len(trace.header.layers)
    table = trace.tokens()
    assert table.token_id is not None
    assert table.token_id.tolist() == TOKENS
    assert table.position.tolist() == list(range(len(TOKENS)))


def test_recording_changes_no_logit_and_stores_token_ids_only_when_asked(tiny_model: TinyModel, tmp_path: Path) -> None:
    scores = []
    for trace in (None, tmp_path / "trace"):
        llama = decode(tiny_model(SPEC), trace, budget="100%")
        scores.append(np.array(llama.scores[: len(TOKENS)]))
        llama.close()
    assert np.array_equal(*scores)
    assert read_trace(tmp_path / "trace").tokens().token_id is None


def test_prompts_are_prefill_steps_and_every_prompt_is_a_request(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    llama = Llama(str(tiny_model(SPEC)), n_ctx=128, n_ubatch=16, n_threads=1, verbose=False, expert_trace=str(path))
    for _ in range(2):
        llama.reset()
        llama.eval(TOKENS[:40])
        llama.eval(TOKENS[40:41])
    llama.close()
    steps = list(read_trace(path).steps())
    assert [step.tokens for step in steps] == [16, 16, 8, 1] * 2
    assert [step.phase for step in steps] == ["prefill", "prefill", "prefill", "decode"] * 2
    assert [int(step.requests[-1]) for step in steps] == [0] * 4 + [1] * 4
    assert np.concatenate([step.positions for step in steps]).tolist() == [*range(41)] * 2
    # llama.cpp computes a prompt's last layer for the rows with output only.
    assert [len(step.routes[3]) for step in steps[2:4]] == [1, 1]
    assert len(steps[0].routes[2]) == 16


def test_a_trace_is_continued_by_the_same_model_and_refused_by_another(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for _ in range(2):
        decode(tiny_model(SPEC), path, budget="50%").close()
    assert read_trace(path, least_tokens=2 * len(TOKENS)).counts.requests == 2
    with pytest.raises(TraceMismatchError, match="another model"):
        decode(tiny_model(UNEVEN), path, budget="50%")


def test_a_batch_that_went_past_the_recorder_has_no_positions_and_spoils_nothing(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    llama = Llama(
        str(tiny_model(SPEC)),
        n_ctx=128,
        n_threads=1,
        verbose=False,
        expert_trace=str(tmp_path / "trace"),
        expert_trace_tokens="on",
    )
    llama.eval(TOKENS[:1])
    tokens = (llama_cpp.llama_token * 5)(*TOKENS[1:6])  # the batch only points to it
    with llama._hook.signals:
        assert llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(tokens, 5)) == 0
    llama._hook.finish()
    llama.close()
    table = read_trace(tmp_path / "trace").tokens()
    assert table.position.tolist() == [0, -1, -1, -1, -1, -1]
