"""Virtual experts in llama.cpp: what is chosen is what is computed, and bias 0 is the stock engine."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from expertier.errors import BudgetError, RouterScoresError, UnsupportedModelError, UnsupportedOptionError
from expertier_llamacpp import Llama, ggml, router
from expertier_llamacpp.batch import BatchEngine, Request, Sampling
from expertier_llamacpp.callback import EvalHook
from expertier_llamacpp.exact import wants_exactness
from expertier_llamacpp.router import ARCHITECTURES as VERIFIED
from expertier_llamacpp.router import RouterScores, refuse_unknown
from llamacpp.engines import (
    PROMPT,
    TEXT,
    closing,
    expertier,
    last_logits,
    settings,
    sizes,
    stock_trace,
    stock_twin,
    trace,
)
from support.tiny_gguf import ARCHITECTURES, TinySpec

pytestmark = pytest.mark.engine

TinyModel = Callable[[TinySpec], Path]


def spec(architecture: str = "qwen3moe") -> TinySpec:
    return TinySpec(architecture=architecture, experts=16, top_k=4, feed_forward=64, expert_type="F16")


def tight(path: Path) -> int:
    """A budget that makes most tokens lack an expert and still holds a micro-batch of a prompt."""
    need = sizes(path)
    return max(need.layer, need.total // 3)


class Watch:
    """What the layers of decode steps were given: routes, scores, weights, residents and the choice."""

    def __init__(self, llm: Llama) -> None:
        self.seen: list[tuple[Any, ...]] = []
        virtual = llm.virtual
        assert virtual is not None
        stock = virtual.choose

        def choose(layer: int, routes: Any, resident: Any, ask: Any, **more: Any) -> Any:
            scores, weights = (np.array(item) for item in ask())
            chosen = stock(layer, routes, resident, ask, **more)
            self.seen.append((layer, routes, scores, weights, resident, chosen))
            return chosen

        virtual.choose = choose  # type: ignore[method-assign]


def test_the_verified_architectures_are_those_that_are_tested() -> None:
    assert frozenset(ARCHITECTURES) == VERIFIED
    with pytest.raises(UnsupportedModelError, match=r"'grok'.*verified are: deepseek2, gpt-oss"):
        refuse_unknown("grok")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bias_zero_gives_the_logits_of_the_stock_engine(tiny_model: TinyModel, architecture: str) -> None:
    path = tiny_model(spec(architecture))
    expected = stock_trace(path)
    with closing(expertier(path, tight(path), expert_virtual_bias=0)) as llm:
        assert trace(llm) == expected
        assert "lossless" in llm.mode_line()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_scores_read_from_the_graph_rank_as_the_router_does(tiny_model: TinyModel, architecture: str) -> None:
    path = tiny_model(spec(architecture))
    with closing(expertier(path, tight(path), expert_virtual_bias=0.1, expert_virtual_prefill="on")) as llm:
        watch = Watch(llm)
        trace(llm, steps=4)
        assert {len(routes) for _, routes, *_ in watch.seen} > {1}
        for _, routes, scores, weights, _, _ in watch.seen:
            best = -np.sort(-scores, axis=1)[:, : routes.shape[1]]
            assert (np.take_along_axis(scores, routes, axis=1) == best).all()
            assert (weights > 0).all() and (weights <= 1).all()
            if architecture not in ("hy_v3", "deepseek2"):  # which rank with a correction
                assert (np.take_along_axis(scores, routes, axis=1) == weights).all()
            if architecture == "deepseek2":  # two of four groups are closed
                assert (np.isneginf(scores).sum(axis=1) == 8).all()
            else:
                assert np.isfinite(scores).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stand_ins_are_computed_with_the_router_s_own_weights(
    tiny_model: TinyModel, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[Any] = []
    gathered: list[tuple[int, Any]] = []
    read, on_eval = RouterScores.of, EvalHook._on_eval

    def reading(self: RouterScores, node: int, routes: Any) -> Any:
        source = self._find(node)
        tables.append(router._table(source.probabilities or source.scores, len(routes)).copy())
        return read(self, node, routes)

    def listening(self: EvalHook, node: int, ask: bool, data: int | None) -> bool:
        tensor = ggml.Tensor.from_address(node)
        name = tensor.name.decode()
        if not re.fullmatch(r"ffn_moe_weights-\d+", name):
            return on_eval(self, node, ask, data)
        if not ask:
            values = (ctypes.c_float * tensor.ne[1]).from_address(tensor.data)
            gathered.append((int(name.rpartition("-")[2]), np.array(values[:], np.float32)))
        return True

    monkeypatch.setattr(RouterScores, "of", reading)
    monkeypatch.setattr(EvalHook, "_on_eval", listening)
    path = tiny_model(spec(architecture))
    with closing(expertier(path, tight(path), expert_virtual_bias=0.5)) as llm:
        llm.eval(PROMPT)
        watch = Watch(llm)
        tables.clear()
        gathered.clear()
        for token in PROMPT[:12]:
            llm.eval([token])
        assert llm.virtual is not None
        probabilities = iter(tables)
        replaced = 0
        assert len(watch.seen) == len(gathered)
        for (layer, routes, scores, _, resident, chosen), (computed_layer, weights) in zip(
            watch.seen, gathered, strict=True
        ):
            table = next(probabilities)  # read once, however many ask
            assert layer == computed_layer
            assert (weights == table[0, chosen[0]]).all()
            assert len(set(chosen[0].tolist())) == chosen.shape[1]
            assert resident[chosen[chosen != routes]].all()
            assert np.isfinite(scores[0, chosen[0]]).all()
            replaced += int((chosen != routes).sum())
        assert replaced == llm.virtual.substituted.sum() > 0


def test_substitution_saves_loads_and_is_told(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    misses = []
    for bias in (0, 0.1, 0.5):
        with closing(expertier(path, tight(path), expert_virtual_bias=bias)) as llm:
            llm.eval(PROMPT)
            start = llm.offload.stats().decode
            for token in PROMPT:
                llm.eval([token])
            stats = llm.offload.stats().decode
            misses.append(stats.misses + stats.late - start.misses - start.late)
            assert llm.virtual is not None
            told = llm.virtual.stats()
            if bias:
                assert (told.tokens, told.exact_tokens) == (len(PROMPT), len(PROMPT))
                assert 0 < max(told.substituted_mass) < max(told.substituted_share) < 1
                assert f"lossy: resident experts preferred by {bias}" in llm.mode_line()
    assert misses[0] > misses[1] > misses[2]


@pytest.mark.parametrize("prefill", ["off", "on"])
def test_a_prompt_is_exact_unless_asked(tiny_model: TinyModel, prefill: str) -> None:
    path = tiny_model(spec())
    with closing(expertier(path, tight(path), expert_virtual_bias=2, expert_virtual_prefill=prefill)) as llm:
        for start in range(0, 30, 3):  # in long prompts somebody insists on nearly every expert, and all keep it
            llm.reset()
            llm.eval(PROMPT[start : start + 3])
        assert llm.virtual is not None
        assert llm.virtual.substituted.any() == (prefill == "on")
        assert llm.virtual.tokens == (30 if prefill == "on" else 0)
        llm.reset()
        llm.eval(PROMPT)
        if prefill == "off":
            assert last_logits(llm).tobytes() == stock_trace(path, steps=0)[0]


@pytest.mark.parametrize("changes", [{"n_ubatch": 8}, {"n_ubatch": 8, "n_batch": 8}])
def test_a_prompt_whose_last_batch_is_one_token_is_exact_to_the_end(
    tiny_model: TinyModel, changes: dict[str, Any]
) -> None:
    path = tiny_model(spec())
    assert len(PROMPT) % 8 == 1
    (expected,) = stock_trace(path, steps=0, **changes)
    with closing(expertier(path, tight(path), expert_virtual_bias=2, **changes)) as llm:
        llm.eval(PROMPT)
        assert last_logits(llm).tobytes() == expected
        assert llm.virtual is not None
        assert llm.virtual.tokens == 0


def test_the_bias_can_be_turned_down_to_exactness_and_up_again(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    expected = stock_trace(path)
    with closing(expertier(path, tight(path), expert_virtual_bias=0.5)) as llm:
        assert llm.virtual is not None
        lossy = trace(llm)
        assert lossy[0] == expected[0] and lossy != expected
        llm.virtual.bias = 0
        llm.reset()
        assert trace(llm) == expected
        llm.virtual.bias = 0.5
        llm.reset()
        assert trace(llm) != expected


def test_with_every_expert_resident_the_bias_has_no_effect(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    with closing(expertier(path, "100%", expert_virtual_bias=0.5)) as llm:
        for layer in llm.catalog.layers:
            llm.offload.acquire(layer.layer, range(layer.experts)).release()
        assert trace(llm) == stock_trace(path)
        assert llm.virtual is not None
        assert llm.virtual.tokens == 16 and not llm.virtual.substituted.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_virtual_protect": 1}, "do nothing without virtual_bias"),
        ({"expert_virtual_prefill": "on"}, "do nothing without virtual_bias"),
        ({"expert_virtual_bias": 0.1, "expert_virtual_hard": "on"}, "contradict each other"),
        ({"expert_virtual_protect": 1, "expert_virtual_hard": "on"}, "contradict each other"),
        ({"expert_virtual_bias": 0.1, "expert_virtual_protect": 4}, "protects all 4 experts"),
        ({"expert_virtual_bias": 0.1, "expert_trace": "a.trace"}, "trace says how the exact model routes"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tiny_model: TinyModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedOptionError, match=message):
        expertier(tiny_model(spec()), "100%", **options)


# ---- one request


LOSSY: dict[str, Any] = {"expert_virtual_bias": 0.5}
ASKED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "seed": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_asks_for_exactness_gets_the_stock_engine_s_answer_among_others(
    tiny_model: TinyModel, stream: bool
) -> None:
    path = tiny_model(spec())

    def text(answer: Any) -> str:
        return "".join(piece["choices"][0]["text"] for piece in (answer if stream else [answer]))

    with closing(stock_twin(path)) as stock:
        expected = text(stock(TEXT, stream=stream, **ASKED))
    with closing(expertier(path, tight(path), **LOSSY)) as llm:
        lossy = text(llm(TEXT, stream=stream, **ASKED))
        assert lossy != expected  # and its tokens stay in the context, where the next prompt finds them
        exact_tokens = llm.virtual.exact_tokens
        again = TEXT + lossy
        exact = text(llm.create_completion(TEXT, stream=stream, expert_exact=True, **ASKED))
        assert exact == expected
        assert llm.virtual.exact_tokens > exact_tokens + 8
        with closing(stock_twin(path)) as stock:
            continued = text(stock(again, stream=stream, **ASKED))
        llm(TEXT, stream=stream, **ASKED)
        assert text(llm(again, stream=stream, expert_exact=True, **ASKED)) == continued


def test_an_exact_answer_does_not_begin_with_a_state_that_was_computed_with_stand_ins(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    with closing(expertier(path, tight(path), expert_virtual_bias=1.0, expert_virtual_prefill="on")) as llm:

        def exactly() -> Any:
            return llm(TEXT, expert_exact=True, **ASKED)["choices"][0]["text"]

        expected = exactly()
        llm.reset()
        assert llm(TEXT, **ASKED)["choices"][0]["text"] != expected
        state = llm.save_state()
        assert exactly() == expected
        llm.load_state(state)
        assert exactly() == expected


def test_streams_of_exact_and_other_requests_do_not_mix(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    with closing(expertier(path, tight(path), **LOSSY)) as llm:
        stream = llm(TEXT, stream=True, expert_exact=True, **ASKED)
        next(stream)
        assert llm.virtual.allowed("decode")
        list(stream)
        assert llm.virtual.allowed("decode")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"expertier": {"exact": true}}', True),
        (b'{"prompt": "x", "expertier": {"exact": false}}', False),
        (b'{"expertier": {}}', False),
        (b'{"expertier": null}', False),
        (b'{"prompt": "expertier"}', False),
        (b'{"prompt": "\\"expertier\\""}', False),
        (b"not json", False),
    ],
)
def test_what_a_body_asks_for(body: bytes, expected: bool) -> None:
    assert wants_exactness(body) is expected


@pytest.mark.parametrize("own", [b"true", b'{"exact": "yes"}', b'{"exakt": true}'])
def test_a_misspelt_wish_for_exactness_is_not_answered_lossily(own: bytes) -> None:
    with pytest.raises(ValueError, match=r'it can be {"exact": true}'):
        wants_exactness(b'{"expertier": ' + own + b"}")


def test_scores_that_are_no_numbers_end_the_step_and_not_the_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    broken = Path(shutil.copy(tiny_model(spec()), tmp_path / "broken.gguf"))
    [gate] = [tensor for tensor in GGUFReader(broken).tensors if tensor.name == "blk.1.ffn_gate_inp.weight"]
    with broken.open("r+b") as file:
        file.seek(int(gate.data_offset))
        file.write(np.full(gate.n_elements, np.nan, np.float32).tobytes())
    with closing(expertier(broken, tight(broken), expert_virtual_bias=0.3)) as llm:
        for _ in range(2):
            llm.reset()
            with pytest.raises(RouterScoresError, match="not numbers"):
                for token in PROMPT:
                    llm.eval([token])


# ---- hard mode


def test_in_hard_mode_no_decode_step_waits_and_the_resident_set_follows_the_wishes(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    with closing(expertier(path, tight(path) + sizes(path).token * 3, expert_virtual_hard="on")) as llm:
        assert "lossy: resident experts only" in llm.mode_line()
        watch = Watch(llm)
        llm.eval(PROMPT)
        for token in PROMPT:
            llm.eval([token])
        stats = llm.offload.stats()
        assert stats.decode.misses == stats.decode.late == 0
        assert stats.decode.stall_seconds == 0
        assert stats.decode.tokens == len(PROMPT)
        assert stats.swaps > 0
        assert stats.peak_resident_bytes <= stats.budget_bytes
        assert llm.virtual.substituted.sum() > 0
        assert all(resident[chosen].all() for *_, resident, chosen in watch.seen)


def test_hard_mode_computes_exact_prompts(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    with closing(expertier(path, tight(path) + sizes(path).token * 3, expert_virtual_hard="on")) as llm:
        for _ in range(2):
            llm.reset()
            llm.eval(PROMPT)
            assert last_logits(llm).tobytes() == stock_trace(path, steps=0)[0]
            llm.eval([1])


def test_hard_mode_needs_room_for_one_token_in_every_layer(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    with pytest.raises(BudgetError, match="in every layer at once"):
        expertier(path, sizes(path).token * 2, expert_virtual_hard="on")
    with closing(expertier(path, sizes(path).token * 3, expert_virtual_hard="on")) as llm:
        llm.eval([1])
        with pytest.raises(BudgetError, match="in every layer at once"):
            llm.offload.resize(sizes(path).token * 2)
        llm.eval([2])


def test_hard_mode_with_groups_of_experts_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UnsupportedOptionError, match="groups of experts"):
        expertier(tiny_model(spec("deepseek2")), "100%", expert_virtual_hard="on")


def test_of_sequences_together_one_may_be_exact_whoever_runs_beside_it_and_did_before(tiny_model: TinyModel) -> None:
    path = tiny_model(spec())
    prompt = PROMPT[:20]
    asked = Request(prompt=prompt, max_tokens=12, sampling=Sampling(temperature=0.0))

    def answers(requests: list[Request]) -> list[tuple[int, ...]]:
        last = {output.index: output.tokens for output in engine.generate(requests) if output.finish_reason is not None}
        return [last[index] for index in sorted(last)]

    with closing(BatchEngine(str(path), expert_budget=tight(path), expert_repack="off", **settings())) as engine:
        (expected,) = answers([asked])
        together = answers([asked] * 3)
    options = {"expert_budget": tight(path), "expert_repack": "off", **LOSSY}
    with closing(BatchEngine(str(path), **options, **settings())) as engine:
        exact = replace(asked, exact=True)
        assert answers([asked]) != [expected]
        assert answers([exact]) == [expected]
        before = engine.llama.virtual.tokens
        assert answers([asked, exact, asked])[1] == together[1]
        assert answers([exact, exact, exact]) == together
        continued = replace(exact, prompt=[*prompt, *answers([asked])[0]])
        (lossless,) = answers([continued])
        assert engine.llama.virtual.tokens > before
    with closing(BatchEngine(str(path), expert_budget=tight(path), expert_repack="off", **settings())) as engine:
        assert answers([continued]) == [lossless]
