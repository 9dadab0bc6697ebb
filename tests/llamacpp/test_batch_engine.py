"""Many sequences in one context: every request gets what it asked for, whatever happens around it."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import llama_cpp as C  # noqa: N812

from expertier.errors import (
    ExpertLoadError,
    ManagerClosedError,
    RequestCancelledError,
    RequestError,
    RequestTooLongError,
    UnsupportedOptionError,
)
from expertier.scheduling import BATCHERS, PathBook
from expertier.storage import StorageFile
from expertier_llamacpp import BatchEngine
from expertier_llamacpp.batch import Output, Request, Sampling
from expertier_llamacpp.batch.sampling import make_sampler
from expertier_llamacpp.batch.view import RequestView
from llamacpp.engines import SETTINGS, closing, expertier, sizes
from llamacpp.stock_batches import record, replay, stock_context
from support.tiny_gguf import TinySpec, write_tiny

pytestmark = pytest.mark.engine

SPEC = TinySpec(experts=16)
LONG = "a common beginning that is longer than the few tokens which are not worth waiting for, "
PROMPTS = ["the quick brown fox ", "hello there ", "a " * 40, "zzz", LONG + "one", "q", "lorem ipsum ", LONG + "two"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_tiny(tmp_path_factory.mktemp("batched") / "tiny.gguf", SPEC)
    yield path
    path.unlink()


ENDLESS = {token: -100.0 for token in (318, 319)}  # the tokens that end a text

Load = Callable[..., BatchEngine]


@pytest.fixture
def load(model: Path) -> Iterator[Load]:
    engines: list[BatchEngine] = []

    def make(**changes: Any) -> BatchEngine:
        options = {"expert_budget": sizes(model).layer, "expert_repack": "off", **SETTINGS, "n_ctx": 1024, **changes}
        engines.append(BatchEngine(str(model), **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def finished(outputs: Iterator[Output]) -> list[Output]:
    """The last output of every prompt, in the order of prompts; each must come exactly once."""
    last = [output for output in outputs if output.finish_reason is not None]
    assert sorted(output.index for output in last) == list(range(len(last)))
    return sorted(last, key=lambda output: output.index)


def one(engine: BatchEngine, prompt: Any, **options: Any) -> Output:
    return finished(engine.generate([prompt], **options))[0]


# ---- what is computed


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 5}], ids=["greedy", "sampled"])
def test_a_sequence_alone_gets_the_tokens_of_the_drop_in_class(model: Path, load: Load, options: Any) -> None:
    for prompt in PROMPTS[:3]:
        with closing(expertier(model, sizes(model).layer, n_ctx=1024)) as llm:
            llm.set_seed(options.get("seed", 0))
            tokens = llm.tokenize(prompt.encode(), add_bos=False, special=True)
            chosen = itertools.islice(llm.generate(tokens, temp=options.get("temperature", 0.8)), 24)
            expected = itertools.takewhile(lambda token: not C.llama_vocab_is_eog(llm._model.vocab, token), chosen)
            assert one(load(), prompt, max_tokens=24, **options).tokens == tuple(expected)


@pytest.mark.parametrize("budget", ["token", "layer", "total"])
def test_batches_have_the_bits_of_stock_llama_cpp_decoding_the_same_batches(
    model: Path, load: Load, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    engine = load(expert_budget=getattr(sizes(model), budget), max_sequences=4)
    recorded = record(engine, monkeypatch)
    outputs = finished(engine.generate(PROMPTS, max_tokens=12, temperature=0))
    assert all(output.finish_reason in ("length", "stop") for output in outputs)
    assert any(name == "llama_memory_seq_cp" for name, *_ in recorded.calls), "no prefix was shared"
    if budget != "token":
        mixed = [set(step[3]) for step in recorded.steps if len(set(step[3])) < len(step[3])]
        assert any(len(sequences) > 1 for sequences in mixed), "no prompt was computed beside another sequence"
        assert any(len(set(step[3])) == len(step[3]) == 4 for step in recorded.steps)
        with stock_context(model, n_ctx=1024, n_batch=512, n_ubatch=16, sequences=4) as context:
            assert replay(context, recorded.calls) == recorded.logits
    assert engine.offload.stats().peak_resident_bytes <= engine.offload.budget


def test_a_step_of_one_token_per_sequence_counts_as_decoding(load: Load) -> None:
    engine = load()
    before = engine.offload.stats()
    finished(engine.generate([[number] for number in range(8)], max_tokens=5, temperature=0))
    after = engine.offload.stats()
    assert after.decode.steps - before.decode.steps == 5
    assert after.decode.tokens - before.decode.tokens == 40
    assert after.prefill.steps == before.prefill.steps


def test_the_same_call_gives_the_same_output_and_another_seed_another(load: Load) -> None:
    engines = [load(), load(), load()]
    first, again, other = (
        [output.tokens for output in finished(engine.generate(PROMPTS, max_tokens=12, seed=seed))]
        for engine, seed in zip(engines, (3, 3, 4), strict=True)
    )
    assert first == again
    assert all(left != right for left, right in zip(first, other, strict=True))


def test_logit_bias_and_penalties_reach_the_sampler(load: Load) -> None:
    engine = load()
    assert one(engine, "abc", max_tokens=5, temperature=0, logit_bias={65: 100.0}).text == "AAAAA"
    assert one(engine, "abc", max_tokens=5, temperature=0, logit_bias={65: 8.0}, presence_penalty=50.0).text != "AAAAA"


def test_every_request_may_have_options_of_its_own(load: Load) -> None:
    engine = load()
    biased = Sampling(temperature=0, logit_bias={66: 100.0})
    requests = [Request(prompt="abc", max_tokens=3, sampling=biased), "abc"]
    first, second = finished(engine.generate(requests, max_tokens=6, temperature=0, logit_bias={65: 100.0}))
    assert (first.text, second.text) == ("BBB", "AAAAAA")


def test_logprobs_are_those_the_drop_in_class_answers(model: Path, load: Load) -> None:
    with closing(expertier(model, sizes(model).layer, n_ctx=1024, logits_all=True)) as llm:
        options: Any = {"max_tokens": 8, "seed": 5, "logit_bias": ENDLESS}
        answer: Any = llm.create_completion(PROMPTS[0], logprobs=3, **options)["choices"][0]
    output = one(load(), PROMPTS[0], logprobs=3, **options)
    assert output.text == answer["text"]
    assert tuple(item.token for item in output.logprobs) == output.tokens
    assert [item.logprob for item in output.logprobs] == pytest.approx(answer["logprobs"]["token_logprobs"], rel=1e-6)
    for item, expected in zip(output.logprobs, answer["logprobs"]["top_logprobs"], strict=True):
        assert list(item.top.values()) == sorted(item.top.values(), reverse=True)
        ours = [*item.top.values(), item.logprob]  # tokens that are no characters share a key in the answer
        assert all(min(abs(value - own) for own in ours) < 1e-5 for value in expected.values())
        assert max(expected.values()) == pytest.approx(ours[0], rel=1e-6)
        assert len(item.top) == 3


def test_logprobs_in_company_are_each_requests_own_and_only_of_those_that_asked(load: Load) -> None:
    asked = Request(prompt=PROMPTS[0], max_tokens=6, sampling=Sampling(temperature=0), logprobs=0)
    outputs = list(load().generate([asked, PROMPTS[1], asked], max_tokens=4, temperature=0, stream=True))
    last = finished(iter(outputs))
    assert [len(output.logprobs) for output in last] == [len(last[0].tokens), 0, len(last[2].tokens)]
    assert len(last[0].logprobs) > 1
    assert all(item.logprob < 0 and not item.top for output in last for item in output.logprobs)
    assert all(not output.logprobs for output in outputs if output.finish_reason is None)


# ---- text


def test_streamed_pieces_are_the_whole_text(load: Load) -> None:
    pieces: dict[int, list[Output]] = {}
    for output in load().generate(PROMPTS, max_tokens=20, seed=1, stream=True):
        pieces.setdefault(output.index, []).append(output)
    assert len(pieces) == len(PROMPTS)
    for outputs in pieces.values():
        assert "".join(output.piece for output in outputs) == outputs[-1].text
        assert len(outputs) > 5
        assert [output.finish_reason is not None for output in outputs] == [*[False] * (len(outputs) - 1), True]


def test_output_ends_before_a_stop_text_and_no_piece_contains_its_beginning(load: Load) -> None:
    options: Any = {"temperature": 0, "logit_bias": {token: 60.0 for token in b"xyz"}, "max_tokens": 40}
    text = one(load(), PROMPTS[0], **options).text
    place = next(place for place in range(4, len(text) - 3) if text.find(text[place : place + 3]) == place)
    stop = text[place : place + 3]
    outputs = list(load().generate([PROMPTS[0]], stop=[stop, "never there"], stream=True, **options))
    assert outputs[-1].text == text[:place]
    assert outputs[-1].finish_reason == "stop"
    assert "".join(output.piece for output in outputs) == text[:place]


# ---- room


def test_more_requests_than_places_are_all_answered_once(load: Load) -> None:
    engine = load(max_sequences=3)
    outputs = finished(
        engine.generate((f"{number} {PROMPTS[0]}" for number in range(20)), max_tokens=5, logit_bias=ENDLESS)
    )
    assert len(outputs) == 20
    assert {len(output.tokens) for output in outputs} == {5}
    assert engine.stats().running == engine.stats().waiting == 0


def test_requests_that_do_not_fit_the_kv_memory_together_wait_or_are_set_back(load: Load) -> None:
    engine = load(n_ctx=256)
    assert engine.n_ctx == 256
    prompts = [[number] * 40 for number in range(12)]
    outputs = finished(engine.generate(prompts, max_tokens=60, seed=2, logit_bias=ENDLESS))
    assert {len(output.tokens) for output in outputs} == {60}
    assert engine.stats().set_back > 0
    assert engine.stats().kv_tokens <= 256


def test_a_common_beginning_is_computed_once(load: Load) -> None:
    engine = load()
    beginning = list(range(100))
    outputs = finished(engine.generate([[*beginning, number] for number in range(8)], max_tokens=4, temperature=0))
    assert len(outputs) == 8
    assert engine.stats().reused_tokens == 7 * 100
    one(engine, [*beginning, 200], max_tokens=1, temperature=0)  # kept after the requests are over
    assert engine.stats().reused_tokens == 8 * 100


def test_a_request_whose_leader_is_over_computes_its_prompt_itself(load: Load) -> None:
    engine = load()
    prompt = list(range(100))
    outputs = engine.generate([prompt] * 4, max_tokens=1, temperature=0)  # the leader ends with its prompt
    assert [len(output.tokens) for output in finished(outputs)] == [1] * 4


def test_steps_get_smaller_until_their_experts_fit_the_budget(model: Path, load: Load) -> None:
    engine = load(expert_budget=sizes(model).token)
    outputs = finished(engine.generate(PROMPTS, max_tokens=6, temperature=0))
    assert {output.finish_reason for output in outputs} <= {"length", "stop"}
    assert engine.stats().shortened_steps > 0
    assert engine.offload.stats().peak_resident_bytes <= sizes(model).token


def test_budget_auto_serves_batches(load: Load) -> None:
    outputs = finished(load(expert_budget="auto").generate(PROMPTS, max_tokens=4, temperature=0))
    assert {len(output.tokens) for output in outputs} == {4}


@pytest.mark.parametrize("scheduling", sorted(BATCHERS))
def test_every_scheduler_answers_everybody_with_the_same_tokens_as_first_come_first_served(
    load: Load, scheduling: str
) -> None:
    engine = load(max_sequences=1, scheduling=scheduling)
    prompts = [[number] * (3 + number) for number in range(8)]
    outputs = finished(engine.generate(prompts, max_tokens=4, temperature=0))
    alone = load(max_sequences=1)
    assert [output.tokens for output in outputs] == [
        output.tokens for output in finished(alone.generate(prompts, max_tokens=4, temperature=0))
    ]


@pytest.mark.parametrize("broken", ["batcher", "forecast", "routes"])
def test_when_regrouping_fails_everybody_is_answered_once_in_order_of_arrival_and_that_is_said_once(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("no idea")

    engine = load(max_sequences=2, scheduling="similarity")
    place = {"batcher": (engine.admission.batcher, "choose"), "forecast": (PathBook, "of_waiting")}
    monkeypatch.setattr(*place.get(broken, (PathBook, "observe")), fail)
    told = []
    with caplog.at_level(logging.WARNING, logger="expertier"):
        for output in engine.generate([[number] * 4 for number in range(10)], max_tokens=3, logit_bias=ENDLESS):
            told.append(output.index)
            assert len(output.tokens) == 3
    assert told == list(range(10))
    assert [record.message for record in caplog.records if "no idea" in record.message] == [caplog.messages[0]]


def test_identical_requests_get_the_same_tokens_and_a_single_one_is_served(load: Load) -> None:
    engine = load(max_sequences=3, scheduling="similarity", n_ctx=512)
    options: Any = {"max_tokens": 5, "temperature": 0, "logit_bias": ENDLESS}
    outputs = finished(engine.generate([PROMPTS[0]] * 9, **options))
    assert {len(output.tokens) for output in outputs} == {5}
    assert len({output.tokens for output in outputs}) == 1
    assert one(engine, PROMPTS[0], **options).tokens == outputs[0].tokens


def test_places_that_stay_empty_until_two_are_free_change_no_tokens_and_join_prompts(load: Load) -> None:
    prompts = [[number] * 20 for number in range(12)]
    options: Any = {"max_tokens": 6, "temperature": 0, "logit_bias": ENDLESS}
    requests = [Request(prompt=prompt, max_tokens=4 + number) for number, prompt in enumerate(prompts)]
    tokens, prompt_steps = [], []
    for together in (1, 2):
        engine = load(max_sequences=4, scheduling="similarity", expert_budget=None)
        engine.admission.together.size = lambda places, size=together: size  # type: ignore[method-assign, misc]
        asked = [replace(request, sampling=Sampling(temperature=0, logit_bias=ENDLESS)) for request in requests]
        tokens.append({output.index: len(output.tokens) for output in finished(engine.generate(asked, **options))})
        prompt_steps.append(engine.offload.stats().prefill.steps)
        assert (engine.admission.stats.held > 0) == (together > 1)
    assert tokens[0] == tokens[1] == {number: 4 + number for number in range(12)}
    assert prompt_steps[1] < prompt_steps[0]


def test_nobody_waits_with_an_empty_place_for_requests_that_want_no_tokens(load: Load) -> None:
    class Full:
        paused = False

        def token(self, token: int) -> None:
            self.paused = True

        def end(self, reason: Any, error: Any) -> None:
            pass

    engine = load(max_sequences=2, scheduling="similarity")
    engine.admission.together.size = lambda places: 2  # type: ignore[method-assign]
    sampler = make_sampler(engine.llama, Sampling(temperature=0, logit_bias=ENDLESS))
    engine.submit_tokens([1, 2], sampler, Full())  # type: ignore[arg-type]
    while engine.step():
        pass
    told: list[Output] = []
    for _ in range(3):
        engine.submit(Request(prompt="abc", max_tokens=2), told.append, stream=False)
    while engine.step():
        pass
    assert len(told) == 3


def test_a_scheduler_learns_the_routes_of_every_token(load: Load) -> None:
    engine = load(max_sequences=4, scheduling="similarity")
    seen: list[tuple[Any, ...]] = []
    engine.admission.observe = lambda *step: seen.append(step)  # type: ignore[method-assign]
    finished(engine.generate([[1] * 20, [2] * 3, [3] * 3], max_tokens=3, temperature=0, logit_bias=ENDLESS))
    assert sum(len(tokens) for _, tokens, _ in seen) == 20 + 3 + 3 + 3 * 2
    for names, tokens, routes in seen:
        assert routes.shape == (len(tokens), SPEC.layers, SPEC.top_k) == (len(names), SPEC.layers, SPEC.top_k)
        assert (routes[:, :-1] >= 0).all()
        wanted = [row for row, name in enumerate(names) if names[row + 1 : row + 2] != [name]]
        assert (routes[wanted, -1] >= 0).all()  # the last layer is computed for rows with output only


# ---- what goes wrong


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("", {}, RequestError, "empty"),
        ([], {}, RequestError, "empty"),
        ([1] * 1024, {}, RequestTooLongError, "exceed context window of 1024"),
        ([320], {}, RequestError, "Token 320"),
        ("\ud800", {}, RequestError, "not text"),
        (None, {}, RequestError, "no text and no tokens"),
        (b"abc", {}, RequestError, "bytes"),
        ([1, 2.5], {}, RequestError, "no text and no tokens"),
        ("a", {"max_tokens": 0}, RequestError, "max_tokens=0"),
        ("a", {"temperature": -1.0}, RequestError, "temperature"),
        ("a", {"repeat_penalty": 0.0}, RequestError, "repeat_penalty"),
        ("a", {"top_p": float("nan")}, RequestError, "top_p"),
        ("a", {"logit_bias": {1000: 1.0}}, RequestError, "token 1000"),
        ("a", {"logprobs": -1}, RequestError, "logprobs=-1"),
        ("a", {"logprobs": 1000}, RequestError, "logprobs=1000"),
        ("a", {"logprobs": True}, RequestError, "logprobs=True"),
    ],
)
def test_a_request_that_cannot_be_served_says_why_and_harms_no_other(
    load: Load, prompt: Any, options: Any, error: type[Exception], words: str
) -> None:
    refused = Request(
        prompt=prompt,
        max_tokens=options.pop("max_tokens", 4),
        logprobs=options.pop("logprobs", None),
        sampling=Sampling(**options),
    )
    engine = load()
    outputs = finished(engine.generate(["abc", refused, "abd"], max_tokens=3, temperature=0))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert isinstance(outputs[1].error, error)
    assert words in str(outputs[1].error)
    with pytest.raises(error, match=words.replace("(", r"\(")):
        engine.submit(refused, print)


def test_options_that_do_not_exist_are_refused_at_once(model: Path, load: Load) -> None:
    with pytest.raises(RequestError, match="temprature"):
        load().generate(["a"], temprature=0)
    with pytest.raises(RequestError, match="list"):
        load().generate("a prompt")
    with pytest.raises(UnsupportedOptionError, match="max_sequences=0"):
        load(max_sequences=0)
    with pytest.raises(UnsupportedOptionError, match="1 to 256"):
        load(max_sequences=1000)
    with pytest.raises(UnsupportedOptionError, match="embedding"):
        load(embedding=True)
    with pytest.raises(UnsupportedOptionError, match="no scheduler 'fastest'"):
        load(scheduling="fastest")


def test_a_read_error_fails_the_requests_of_that_step_and_the_engine_lives(
    model: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(expert_budget=sizes(model).slot * 24, max_sequences=2, expert_lookahead="off")
    stock = StorageFile._pread
    broken = False

    def read(file: StorageFile, view: memoryview, offset: int) -> int:
        if broken:
            raise OSError(5, "Input/output error")
        return stock(file, view, offset)

    monkeypatch.setattr(StorageFile, "_pread", read)
    outputs = []
    for output in engine.generate(["abc", "bcd", *PROMPTS[:2]], max_tokens=50, logit_bias=ENDLESS, stream=True):
        outputs.append(output)
        broken = len(outputs) > 6 and not any(item.finish_reason == "error" for item in outputs)
    last = finished(iter(outputs))
    failed = [output for output in last if output.finish_reason == "error"]
    assert 1 <= len(failed) <= 2
    assert all(isinstance(output.error, ExpertLoadError) for output in failed)
    assert all(output.finish_reason == "length" for output in last[2:])
    again = finished(engine.generate(PROMPTS[:2], max_tokens=6, logit_bias=ENDLESS))
    assert {len(output.tokens) for output in again} == {6}


def test_a_cancelled_request_ends_as_such_and_its_place_is_free(load: Load) -> None:
    engine = load(max_sequences=1)
    told: list[Output] = []
    running = engine.submit(Request(prompt="abc", max_tokens=None), told.append)
    waiting = engine.submit(Request(prompt="abc", max_tokens=None), told.append)
    for _ in range(4):
        engine.step()
    assert engine.cancel(waiting)
    assert engine.cancel(running)
    assert not engine.cancel(running)
    count = len(told)
    assert [output.finish_reason for output in told[-2:]] == ["cancelled", "cancelled"]
    assert all(isinstance(output.error, RequestCancelledError) for output in told[-2:])
    assert one(engine, "bcd", max_tokens=3).finish_reason in ("length", "stop")
    assert len(told) == count
    assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.timeout(30)
@pytest.mark.parametrize("way", ["cancel", "close"])
def test_whoever_is_told_a_piece_may_end_the_request_or_everything_there_and_then(load: Load, way: str) -> None:
    engine = load()
    told: list[Output] = []
    other: list[Output] = []

    def tell(output: Output) -> None:
        told.append(output)
        if len(told) == 2:
            engine.cancel(number) if way == "cancel" else engine.close()

    number = engine.submit(Request(prompt="abc", max_tokens=None, sampling=Sampling(logit_bias=ENDLESS)), tell)
    engine.submit(Request(prompt="bcd", max_tokens=8, sampling=Sampling(logit_bias=ENDLESS)), other.append)
    with contextlib.suppress(ManagerClosedError):
        while engine.step():
            pass
    reasons = [output.finish_reason for output in (told[-1], other[-1])]
    assert reasons == (["cancelled", "length"] if way == "cancel" else ["error", "error"])
    assert sum(output.finish_reason is not None for output in told) == 1


def test_outputs_that_nobody_waits_for_any_more_are_not_computed(load: Load) -> None:
    engine = load()
    outputs = engine.generate(PROMPTS, max_tokens=500, seed=1, stream=True)
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    assert not engine.step()
    assert engine.stats().running == 0


def test_an_interruption_loses_and_repeats_nothing(load: Load) -> None:
    expected = one(load(), PROMPTS[0], max_tokens=12, temperature=0).text
    engine = load()
    told: list[Output] = []
    engine.submit(Request(prompt=PROMPTS[0], max_tokens=12, sampling=Sampling(temperature=0)), told.append)
    context: Any = engine.llama._ctx
    decode = context.decode
    moments = itertools.cycle(["before", "after", "never"])

    def interrupted(batch: Any) -> None:
        moment = next(moments)
        if moment == "before":
            raise KeyboardInterrupt
        decode(batch)
        if moment == "after":
            raise KeyboardInterrupt

    context.decode = interrupted
    interruptions = 0
    while not told or told[-1].finish_reason is None:
        try:
            engine.step()
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 24
    assert told[-1].text == expected


def test_a_sampler_that_fails_ends_its_own_request_only(load: Load) -> None:
    class Broken:
        def sample(self, ctx: Any, idx: int) -> int:
            raise ValueError("no idea")

    class Kept:
        paused = False

        def __init__(self) -> None:
            self.ends: list[tuple[Any, ...]] = []

        def token(self, token: int) -> None:
            raise AssertionError

        def end(self, *end: Any) -> None:
            self.ends.append(end)

    engine = load()
    kept = Kept()
    engine.submit_tokens([1, 2, 3], Broken(), kept)
    assert one(engine, "abc", max_tokens=4).finish_reason in ("length", "stop")
    ((reason, error),) = kept.ends
    assert reason == "error"
    assert str(error) == "no idea"


def test_a_listener_that_raises_harms_its_own_request_only(load: Load) -> None:
    def raising(output: Output) -> None:
        raise ValueError("not interested")

    engine = load()
    engine.submit(Request(prompt="abc", max_tokens=20), raising)
    assert len(one(engine, "bcd", max_tokens=4, logit_bias=ENDLESS).tokens) == 4
    assert engine.stats().running == 0


@pytest.mark.timeout(30)
def test_the_engines_thread_outlives_a_step_that_breaks_and_a_listener_that_raises(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(output: Output) -> None:
        raise ValueError("not interested")

    engine = load()
    step, steps = engine._loop.step, itertools.count()

    def breaks_once() -> bool:
        if next(steps) == 1:
            raise KeyError("something nobody thought of")
        return step()

    monkeypatch.setattr(engine._loop, "step", breaks_once)
    engine.submit(Request(prompt="abc", max_tokens=20), raising, stream=False)
    engine.start()
    assert one(engine, "bcd", max_tokens=4).finish_reason is not None
    assert one(engine, "bcd", max_tokens=4, logit_bias=ENDLESS).finish_reason == "length"


def test_closing_ends_what_runs_and_what_waits(load: Load) -> None:
    engine = load(max_sequences=1)
    told: list[Output] = []
    for _ in range(2):
        engine.submit(Request(prompt="abc", max_tokens=None), told.append)
    engine.start()
    while not told:
        pass
    engine.close()
    engine.close()
    assert [output.finish_reason for output in told if output.finish_reason] == ["error", "error"]
    with pytest.raises(ManagerClosedError):
        engine.submit(Request(prompt="abc"), told.append)


def test_an_engine_whose_lent_model_was_closed_says_so(model: Path) -> None:
    with closing(expertier(model, sizes(model).layer, n_ctx=1024, max_sequences=2)) as llm:
        engine = BatchEngine.over(llm)
        engine.start()
        assert one(engine, "abc", max_tokens=2).finish_reason is not None
    with pytest.raises(ManagerClosedError):
        one(engine, "abc", max_tokens=2)
    engine.close()


def test_threads_share_an_engine_that_runs_in_its_own(load: Load) -> None:
    from concurrent.futures import ThreadPoolExecutor

    engine = load()
    engine.start()
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda prompt: one(engine, prompt, max_tokens=8, temperature=0), PROMPTS * 2))
    assert {output.finish_reason for output in texts} == {"length"}


def test_log_probabilities_of_the_output_cost_no_memory_for_the_prompt(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    engine = load(expert_budget="100%")
    engine.start()
    rows: list[int] = []
    stock = llama_cpp.Llama.logits_to_logprobs

    def watched(logits: Any, axis: int = -1) -> Any:
        rows.append(len(logits))
        return stock(logits, axis)

    monkeypatch.setattr(llama_cpp.Llama, "logits_to_logprobs", staticmethod(watched))
    prompt = [5 + number % 50 for number in range(300)]
    answer = RequestView(engine, 1).create_completion(
        prompt, max_tokens=20, logprobs=2, temperature=0, logit_bias=ENDLESS
    )
    expected = one(engine, prompt, max_tokens=20, logprobs=2, temperature=0, logit_bias=ENDLESS).logprobs
    assert rows[0] <= 21
    told = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert told == pytest.approx([item.logprob for item in expected], abs=1e-2)


def test_progress_is_drawn_on_request(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    finished(load().generate(PROMPTS[:2], max_tokens=2, progress=True))
    assert "2/2" in capsys.readouterr().err
