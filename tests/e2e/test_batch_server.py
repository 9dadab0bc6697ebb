"""The real server process with --max-sequences: many of the official clients at once."""

from __future__ import annotations

import signal
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from e2e.test_server import LETTERS, MESSAGES, PROMPT, SERVED, SPEC, Server, _refusal, running
from llamacpp.engines import sizes
from support.tiny_gguf import write_tiny

pytestmark = pytest.mark.engine

# The tokens that end a text are out of reach, so that every answer is as long as was asked for; the others' bytes are
# ASCII, so that streamed and whole texts have the same characters.
ENDLESS: dict[str, float] = {str(token): -100.0 for token in range(128, 320)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # A token's numbers depend a little on what else its batch holds, in stock llama.cpp as here, and the batches depend
    # on when clients come. With 32 bits everywhere this is too little to change which token is the likeliest.
    spec = replace(SPEC, expert_type="F32", other_type="F32")
    path = write_tiny(tmp_path_factory.mktemp("served") / "tiny.gguf", spec)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [f"--{name}={value}" for name, value in {**SERVED, "n_ctx": 2048}.items()]
    arguments += ["--model", str(model), "--model_alias", "tiny", "--max-sequences", "8"]
    arguments += ["--type_k", "0", "--type_v", "0"]  # GGML_TYPE_F32
    arguments += ["--expert_budget", str(sizes(model).layer), "--expert_repack=off", "--budget_endpoint", "true"]
    with running(arguments, tmp_path_factory.mktemp("log") / "server.log") as process:
        yield process
        code = process.stop(signal.SIGTERM)
        log = process.log.read_text()
        assert code in (0, -signal.SIGTERM), log
        assert "Traceback" not in log.split("Shutting down")[1]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as own:
        yield own


def streamed(server: Server, prompt: str, **options: Any) -> str:
    request: Any = {"model": "tiny", "max_tokens": 24, "temperature": 0, "logit_bias": ENDLESS, **options}
    with server.client() as own:
        parts = list(own.completions.create(prompt=prompt, stream=True, **request))
    assert parts[-1].choices[0].finish_reason == "length"
    return "".join(part.choices[0].text for part in parts)


def idle(server: Server) -> Any:
    """Wait until no request runs or waits, and return the engine's counters."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        engine = server.stats()["engine"]
        if not engine["running"] and not engine["waiting"]:
            return engine
        time.sleep(0.02)
    raise AssertionError(server.stats())


def test_eight_streams_at_once_are_the_texts_of_one_after_the_other(server: Server) -> None:
    prompts = [f"{number} {PROMPT}" for number in range(8)]
    expected = [streamed(server, prompt) for prompt in prompts]
    before = idle(server)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: streamed(server, prompt), prompts)) == expected
    after = idle(server)
    together = (after["sequence_steps"] - before["sequence_steps"]) / (after["steps"] - before["steps"])
    assert together > 2, "they were not computed together"


def test_no_request_fails_or_changes_while_the_budget_goes_down_and_up(server: Server, model: Path) -> None:
    prompts = [f"{number} {PROMPT}" for number in range(8)]
    expected = [streamed(server, prompt) for prompt in prompts]
    largest, turned = sizes(model).layer, 0
    with ThreadPoolExecutor(8) as pool:
        under_way = [pool.submit(streamed, server, prompt) for prompt in prompts * 2]
        while not turned or not all(future.done() for future in under_way):
            for budget in (largest // 2, largest):
                stats = server.resize(budget)
                assert stats["budget_bytes"] == budget
                assert stats["resident_bytes"] <= budget
                turned += 1
        assert [future.result() for future in under_way] == expected * 2
    assert turned > 4
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.resize(1)
    assert server.stats()["budget_bytes"] == largest


def test_whole_answers_chats_and_streams_say_the_same(client: openai.OpenAI) -> None:
    request: Any = {"model": "tiny", "max_tokens": 16, "temperature": 0, "logit_bias": ENDLESS}
    whole = client.completions.create(prompt=PROMPT, **request)
    parts = list(client.completions.create(prompt=PROMPT, stream=True, **request))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 16)
    chat = client.chat.completions.create(messages=MESSAGES, **request).choices[0]
    pieces = list(client.chat.completions.create(messages=MESSAGES, stream=True, **request))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == chat.message.content
    assert chat.message.role == "assistant"
    assert chat.finish_reason == pieces[-1].choices[0].finish_reason == "length"


def test_stop_texts_grammars_logprobs_and_seeds_are_each_requests_own(client: openai.OpenAI) -> None:
    request: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16}
    limited: Any = {**request, "extra_body": {"grammar": LETTERS}}
    text = client.completions.create(**limited, temperature=0).choices[0].text
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz ")
    stopped = client.completions.create(**limited, temperature=0, stop=[text[5:8]]).choices[0]
    assert stopped.text == text[: text.find(text[5:8])]
    assert stopped.finish_reason == "stop"
    found = client.completions.create(**limited, temperature=0, logprobs=2).choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert "".join(found.tokens) == text
    assert all(value is not None and value < 0 for value in found.token_logprobs or [None])
    seeded = [client.completions.create(**request, seed=seed, temperature=1).choices[0].text for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_logprobs_of_chats_are_answered_whole_and_streamed(client: openai.OpenAI) -> None:
    request: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0, "logit_bias": ENDLESS, "messages": MESSAGES}
    whole = client.chat.completions.create(**request, logprobs=True, top_logprobs=2).choices[0]
    assert whole.logprobs is not None
    told = whole.logprobs.content or []
    assert len(told) == 6
    assert "".join(item.token for item in told) == whole.message.content
    assert all(item.logprob < 0 and item.logprob in [top.logprob for top in item.top_logprobs] for item in told)
    assert {len(item.top_logprobs) for item in told} <= {2, 3}  # with the chosen one, which a bias made win
    pieces = client.chat.completions.create(**request, logprobs=True, top_logprobs=2, stream=True)
    streamed = [
        item
        for piece in pieces
        for choice in piece.choices
        if choice.logprobs is not None
        for item in choice.logprobs.content or []
    ]
    assert [item.token for item in streamed] == [item.token for item in told]
    # Its beginning was computed before, in other batches.
    assert [item.logprob for item in streamed] == pytest.approx([item.logprob for item in told], abs=1e-3)
    assert client.chat.completions.create(**request).choices[0].logprobs is None


def test_several_choices_and_several_prompts_are_answered_in_order(client: openai.OpenAI) -> None:
    request: Any = {"model": "tiny", "max_tokens": 6, "logit_bias": ENDLESS}
    answer = client.completions.create(prompt=[PROMPT, "fox"], n=2, seed=1, temperature=1, **request)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT) + 3
    assert answer.usage.completion_tokens == 24
    texts = {0: "", 1: ""}
    for part in client.completions.create(prompt="fox", n=2, seed=1, temperature=1, stream=True, **request):
        texts[part.choices[0].index] += part.choices[0].text
    assert [texts[0], texts[1]] == [choice.text for choice in answer.choices[2:]]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_a_bad_request_and_the_server_goes_on(client: openai.OpenAI, stream: bool) -> None:
    request: Any = {"model": "tiny", "max_tokens": 4, "stream": stream}
    for words, options in {
        "maximum context length is 2048": {"prompt": "x " * 2000},
        "prompt is empty": {"prompt": ""},
        "logprobs of the prompt": {"prompt": PROMPT, "logprobs": 1, "echo": True},
        "n=1000": {"prompt": PROMPT, "n": 1000},
    }.items():
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(**request, **options)
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_a_client_that_goes_away_gives_its_place_up_at_once(server: Server, client: openai.OpenAI) -> None:
    before = idle(server)
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=2000, temperature=0, logit_bias=ENDLESS, stream=True
    )
    next(iter(stream))
    assert server.stats()["engine"]["running"] == 1
    stream.close()
    # A client that does not stream is noticed, too.
    impatient = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="tiny", prompt=PROMPT, max_tokens=2000, temperature=0, logit_bias=ENDLESS)
    assert idle(server)["tokens"] - before["tokens"] < 3000


def test_stats_tell_what_the_engine_does(server: Server) -> None:
    stats = server.stats()
    assert stats["model"] == "tiny"
    assert stats["engine"]["kv_capacity"] == 2048
    assert stats["peak_resident_bytes"] <= stats["budget_bytes"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--embedding=true", "embedding"),
        ("--cache=true", "cache"),
        ("--max_sequences=0", "max_sequences"),
        ("--fairness_steps=-1", "fairness_steps=-1"),
    ],
)
def test_what_cannot_be_beside_many_sequences_is_refused_at_start(model: Path, option: str, words: str) -> None:
    assert words in _refusal("--model", model, "--max-sequences", "4", option)


def test_a_scheduler_without_many_sequences_is_refused_instead_of_ignored(model: Path) -> None:
    assert "--max-sequences" in _refusal("--model", model, "--scheduling", "similarity")
