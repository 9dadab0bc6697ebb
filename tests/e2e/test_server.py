"""The real server process answers the official client as the stock engine would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openai
import pytest

from llamacpp.engines import closing, sizes, stock_twin
from support.tiny_gguf import TinySpec, write_tiny

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
SPEC = TinySpec(experts=16)
SERVED = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROMPT = "the quick brown fox "
LETTERS = "root ::= [a-z ]+"
MESSAGES: Any = [{"role": "user", "content": "tell me about foxes"}]


class Server:
    """A running server process."""

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "expertier_llamacpp.server", *arguments],
                env={**clean_environment(), "HOST": "127.0.0.1", "PORT": str(self.port), **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/docs", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def stats(self, key: str = "none") -> Any:
        url = f"http://127.0.0.1:{self.port}/expertier/stats"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def resize(self, budget: str | int) -> Any:
        """Turn the budget; the statistics afterwards."""
        url = f"http://127.0.0.1:{self.port}/expertier/budget"
        body = json.dumps({"budget": budget}).encode()
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def clean_environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("plugin", "adapters"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive", "NO_PROXY": "127.0.0.1"}


@contextmanager
def running(arguments: list[str], log: Path, **environment: str) -> Iterator[Server]:
    server = Server(arguments, log, **environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_tiny(tmp_path_factory.mktemp("served") / "tiny.gguf", SPEC)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [f"--{name}={value}" for name, value in SERVED.items()]
    arguments += ["--model", str(model), "--model_alias", "tiny", "--interrupt_requests", "false"]
    arguments += ["--expert_budget", str(sizes(model).layer), "--expert_repack=off", "--expert_policy", "lru"]
    with running(arguments, tmp_path_factory.mktemp("log") / "server.log") as process:
        yield process
        code = process.stop(signal.SIGTERM)
        log = process.log.read_text()
        assert code in (0, -signal.SIGTERM), log  # uvicorn hands the signal on after it has shut down
        assert "Finished server process" in log
        assert "Traceback" not in log.split("Shutting down")[1]


class Stock:
    """The stock engine with the defaults of the stock server's requests, which differ from the library's."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def __call__(self, prompt: str, **request: Any) -> Any:
        return self.llm(prompt, repeat_penalty=1.1, **request)

    def chat(self, **request: Any) -> Any:
        return self.llm.create_chat_completion(repeat_penalty=1.1, **request)


@pytest.fixture(scope="module")
def stock(model: Path) -> Iterator[Stock]:
    with closing(stock_twin(model, **{**SERVED, "logits_all": True})) as llm:
        yield Stock(llm)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def test_a_completion_is_the_text_of_the_stock_engine(client: openai.OpenAI, stock: Stock) -> None:
    ours = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
    expected = stock(PROMPT, max_tokens=24, temperature=0)
    assert ours.choices[0].text == expected["choices"][0]["text"]
    assert ours.usage is not None
    assert ours.usage.model_dump(exclude_none=True) == expected["usage"]


def test_a_chat_completion_is_the_text_of_the_stock_engine(client: openai.OpenAI, stock: Stock) -> None:
    ours = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0)
    expected = stock.chat(messages=MESSAGES, max_tokens=24, temperature=0)
    assert ours.choices[0].message.content == expected["choices"][0]["message"]["content"]
    assert ours.choices[0].message.role == "assistant"


def test_streamed_text_is_the_whole_text(client: openai.OpenAI) -> None:
    # Letters only: the stock server streams broken UTF-8 sequences differently from whole ones.
    request: Any = {
        "model": "tiny",
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"grammar": LETTERS},
    }
    whole = client.completions.create(prompt=PROMPT, **request).choices[0].text
    parts = [part.choices[0].text for part in client.completions.create(prompt=PROMPT, stream=True, **request)]
    assert "".join(parts) == whole
    assert len(parts) > 10
    answer = client.chat.completions.create(messages=MESSAGES, **request).choices[0].message.content
    pieces = [
        part.choices[0].delta.content or ""
        for part in client.chat.completions.create(messages=MESSAGES, stream=True, **request)
    ]
    assert "".join(pieces) == answer


def test_logprobs_are_those_of_the_stock_engine(client: openai.OpenAI, stock: Stock) -> None:
    ours = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3)
    expected = stock(PROMPT, max_tokens=4, temperature=0, logprobs=3)["choices"][0]["logprobs"]
    found = ours.choices[0].logprobs
    assert found is not None
    assert found.tokens == expected["tokens"]
    assert found.token_logprobs == pytest.approx(expected["token_logprobs"], abs=0)


def test_two_clients_at_once_get_what_each_alone_would_get(server: Server, stock: Stock) -> None:
    prompts = [f"{PROMPT}{number} " for number in range(6)]
    expected = [stock(prompt, max_tokens=12, temperature=0)["choices"][0]["text"] for prompt in prompts]

    def ask(prompt: str) -> str:
        with server.client() as own:
            return own.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0).choices[0].text

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, prompts)) == expected


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [item.id for item in client.models.list()] == ["tiny"]


def test_stats_tell_what_a_request_did(server: Server, client: openai.OpenAI, model: Path) -> None:
    before = server.stats()
    client.completions.create(model="tiny", prompt="something new 123 ", max_tokens=8, temperature=0)
    after = server.stats()
    assert after["model"] == "tiny"
    assert after["mode"].startswith("expertier: qwen3moe, 48 experts")
    assert after["budget_bytes"] == sizes(model).layer
    assert after["peak_resident_bytes"] <= after["budget_bytes"]
    assert after["bytes_read"] > before["bytes_read"]
    assert after["decode"]["tokens"] - before["decode"]["tokens"] >= 7
    assert after["prefill"]["steps"] > before["prefill"]["steps"]


def test_the_mode_line_is_printed_even_if_the_engine_is_quiet(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("expertier: ")]
    assert len(lines) == 1
    assert "policy lru" in lines[0]


def test_a_prompt_that_is_too_long_is_a_bad_request_and_the_server_goes_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="tiny", prompt="x " * 2000, max_tokens=4)
    with pytest.raises(openai.APIStatusError):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, extra_body={"top_k": "many"})
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_a_client_that_goes_away_in_the_middle_harms_nobody(
    server: Server, client: openai.OpenAI, stock: Stock
) -> None:
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=400, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    ours = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
    assert ours.choices[0].text == stock(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]


@pytest.fixture(params=["config.json", "config.yaml"])
def config(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Path:
    need = sizes(model)
    common = {**SERVED, "model": str(model), "expert_repack": "off"}
    settings = {
        "api_key": "secret",
        "models": [
            {**common, "model_alias": "roomy", "expert_budget": "100%", "expert_lookahead": "off"},
            {**common, "model_alias": "tight", "expert_budget": need.token, "expert_policy": "edge"},
        ],
    }
    path = tmp_path / str(request.param)
    path.write_text(json.dumps(settings).replace('"off"', "off" if path.suffix == ".yaml" else '"off"'))
    return path


def test_a_configuration_file_sets_options_per_model(config: Path, model: Path, tmp_path: Path, stock: Stock) -> None:
    need = sizes(model)
    # Two ways to name the file; the second is read by the stock application as well.
    by_flag = config.suffix == ".json"
    arguments = ["--config_file", str(config)] if by_flag else []
    environment = {} if by_flag else {"CONFIG_FILE": str(config)}
    expected = stock("fox", max_tokens=6, temperature=0)["choices"][0]["text"]
    with running(arguments, tmp_path / "log", **environment) as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.stats()
        assert server.stats("secret")["budget_bytes"] == need.total
        client = server.client("secret")
        assert {item.id for item in client.models.list()} == {"roomy", "tight"}

        def ask(name: str, prompt: str) -> str:
            return client.completions.create(model=name, prompt=prompt, max_tokens=6, temperature=0).choices[0].text

        assert ask("roomy", "fox") == expected
        # The budget holds one token's experts: a prompt of several tokens is told so, and the next model still works.
        with pytest.raises(openai.InternalServerError, match="n_ubatch"):
            ask("tight", PROMPT)
        stats = server.stats("secret")
        assert stats["budget_bytes"] == need.token
        assert "policy edge" in stats["mode"]
        assert ask("roomy", "fox") == expected
        assert server.stop(signal.SIGINT) in (0, -signal.SIGINT, 130)
        log = server.log.read_text()
        assert "Finished server process" in log
        assert "Traceback" not in log.split("Shutting down")[1]


def _refusal(*arguments: object, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "expertier_llamacpp.server", *map(str, arguments)],
        env={**clean_environment(), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def _dense(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda model, here: ["--model", _dense(here / "dense.gguf")], "no routed experts"),
        (lambda model, here: ["--model", model, "--expert_budget", "4KiB"], "cannot hold the experts one token needs"),
        (lambda model, here: ["--model", model, "--expert_budget", "lots"], "not an amount of memory"),
        (lambda model, here: ["--model", model, "--expert_policy", "fifo"], "expert_policy"),
        (lambda model, here: ["--model", model, "--n_gpu_layers", "3"], "n_gpu_layers"),
        (lambda model, here: ["--model", here / "absent.gguf"], "no model file"),
        (lambda model, here: [], "model"),
        (lambda model, here: ["--config_file", here / "absent.json"], "absent.json"),
    ],
    ids=["dense", "small", "words", "policy", "gpu", "absent", "nothing", "no-config"],
)
def test_what_cannot_be_served_ends_in_one_line_and_exit_status_2(
    model: Path, tmp_path: Path, arguments: Callable[[Path, Path], list[object]], words: str
) -> None:
    assert words in _refusal(*arguments(model, tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("bad.yaml", "models: [a: b: c", "bad.yaml is not YAML"),
        ("binary.json", "\udcff", "binary.json is not text"),
        ("cut.json", '{"models": [', "Invalid JSON"),
        ("empty.json", '{"models": []}', "Give --model"),
        ("alone.json", '{"models": [{"model": "m", "scheduling": "similarity"}]}', "--max-sequences"),
        ("fair.json", '{"models": [{"model": "m", "fairness_steps": 8}]}', "--max-sequences"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, words: str
) -> None:
    from expertier_llamacpp.server import main

    path = tmp_path / name
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(SystemExit) as ended:
        main(["--config_file", str(path)])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_every_option_of_the_one_table_is_a_flag_and_in_the_environment(model: Path) -> None:
    from dataclasses import fields

    from expertier.config import OffloadOptions
    from expertier_llamacpp.server import OffloadModelSettings

    for option in fields(OffloadOptions):
        assert OffloadModelSettings.model_fields[f"expert_{option.name}"].default is None
    for name in ("EXPERTIER_BUDGET", "EXPERT_BUDGET"):
        assert "'plenty'" in _refusal("--model", model, **{name: "plenty"})


def test_memory_is_not_locked_unless_asked_for(model: Path) -> None:
    from expertier_llamacpp.server import OffloadModelSettings

    assert OffloadModelSettings(model=str(model)).use_mlock is False
    assert OffloadModelSettings(model=str(model), use_mlock=True).use_mlock is True


def test_a_request_to_a_lossy_server_may_ask_for_the_stock_engine_s_answer(
    model: Path, stock: Stock, tmp_path: Path
) -> None:
    arguments = [f"--{name}={value}" for name, value in SERVED.items()]
    arguments += ["--model", str(model), "--model_alias", "tiny", "--expert_budget", str(sizes(model).layer)]
    arguments += ["--expert_repack=off", "--expert_virtual_bias", "2"]
    expected = stock(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    answer = stock.chat(messages=MESSAGES, max_tokens=24, temperature=0)["choices"][0]["message"]["content"]
    exact: Any = {"model": "tiny", "max_tokens": 24, "temperature": 0, "extra_body": {"expertier": {"exact": True}}}
    lossy = {name: value for name, value in exact.items() if name != "extra_body"}
    with running(arguments, tmp_path / "log") as process, process.client() as client:
        assert client.completions.create(prompt=PROMPT, **lossy).choices[0].text != expected
        assert client.completions.create(prompt=PROMPT, **exact).choices[0].text == expected
        parts = client.completions.create(prompt=PROMPT, stream=True, **exact)
        streamed = "".join(part.choices[0].text for part in parts)
        # The stock server streams broken UTF-8 sequences differently from whole ones.
        assert streamed.encode("ascii", "ignore") == expected.encode("ascii", "ignore")
        assert client.chat.completions.create(messages=MESSAGES, **exact).choices[0].message.content == answer
        assert client.completions.create(prompt=PROMPT, **lossy).choices[0].text != expected
        with pytest.raises(openai.BadRequestError, match="it can be"):
            client.completions.create(prompt=PROMPT, **lossy, extra_body={"expertier": {"exact": "please"}})
        assert "lossy: resident experts preferred by 2" in process.stats()["mode"]
