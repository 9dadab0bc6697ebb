"""``vllm serve`` with Expertier answers the official client as stock vLLM would, and tells what it does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from support.tiny_hf import HfSpec, write_hf

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
KEY = "a secret"
TOKENS = 24
LONG = " ".join(["the long prompt that takes several steps"] * 4)  # in steps of 64 tokens, see below
PROMPTS = [
    "the quick brown fox", "def main():", "once upon a time", "int x = 3;",
    "Zwei Dinge", "a b c d e f g", "import numpy as np", LONG,
]  # fmt: skip
MESSAGES: Any = [{"role": "user", "content": "tell me about foxes"}]
ENGINE = ("--max-model-len", "512", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--enforce-eager")

# Stock is asked in a process of its own: what it answers must not depend on anything of ours being imported.
STOCK = """
import json, sys
from vllm import LLM, SamplingParams
model, prompts, messages, tokens = json.loads(sys.argv[1])
llm = LLM(model=model, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64, enforce_eager=True)
greedy = SamplingParams(temperature=0, max_tokens=tokens)
alone = [llm.generate([prompt], greedy)[0].outputs[0] for prompt in prompts]
chat = llm.chat(messages, greedy)[0].outputs[0]
answers = [{"text": answer.text, "tokens": list(answer.token_ids)} for answer in [*alone, chat]]
print("ANSWERS" + json.dumps(answers))
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EXPERTIER_")}
    roots = os.pathsep.join(str(ROOT / name) for name in ("plugin", "adapters"))
    return {
        **kept,
        "PYTHONPATH": roots,
        "OMP_WAIT_POLICY": "passive",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }


class Server:
    """A running ``vllm serve``."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        ours = {"budget": "50%", "budget_endpoint": True, "scheduler": "greedy", "fairness_overtaken": 6}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [
                    *(str(Path(sys.executable).with_name("vllm")), "serve", str(model), *ENGINE),
                    *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)),
                    *("--api-key", KEY, "--additional-config", json.dumps({"expertier": ours})),
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(VLLM_PLUGINS="expertier", VLLM_LOG_STATS_INTERVAL="1"),
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0, timeout=120)

    def get(self, path: str, *, body: Any = None, key: str = KEY) -> str:
        """Answer of a route; POST with a body, GET without."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(answer.read().decode())

    def error(self, path: str, status: int, *, body: Any = None, key: str = KEY) -> Any:
        """The error that a request must end with."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.get(path, body=body, key=key)
        assert caught.value.code == status
        return json.load(caught.value)["error"]

    def stats(self) -> Any:
        return json.loads(self.get("/expertier/stats"))

    def complete(self, prompt: str) -> Any:
        """Greedy completion; the choice has the token ids, too, which is an extension of vLLM."""
        answer = self.client().completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=TOKENS, extra_body={"return_token_ids": True}
        )
        return answer.choices[0]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("served") / "tiny", HfSpec())


@pytest.fixture(scope="module")
def stock(model: Path) -> list[Any]:
    """Stock's answers to every prompt, and to the messages last."""
    job = json.dumps([str(model), PROMPTS, MESSAGES, TOKENS])
    done = subprocess.run(
        [sys.executable, "-c", STOCK, job], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout.partition("ANSWERS")[2].splitlines()[0])
    assert len({tuple(answer["tokens"]) for answer in answers}) > 4  # they say different things
    return answers


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    process = Server(model, tmp_path_factory.mktemp("log") / "server.log")
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()
        print(process.log.read_text())


def unfinished(server: Server) -> float:
    """Requests that run or wait, by vLLM's own metrics."""
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith(names)]
    assert len(lines) == len(names)
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def samples(text: str) -> dict[str, float]:
    """Metrics by name, summed over their labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("expertier_"):
            name, value = line.split("{")[0], float(line.rpartition(" ")[2])
            found[name] = found.get(name, 0.0) + value
    return found


def test_completions_have_stocks_greedy_tokens(server: Server, stock: list[Any]) -> None:
    for prompt, expected in zip(PROMPTS, stock, strict=False):
        assert list(server.complete(prompt).token_ids) == expected["tokens"]


def test_a_chat_has_stocks_answer(server: Server, stock: list[Any]) -> None:
    answer = server.client().chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=TOKENS)
    assert answer.choices[0].message.content == stock[-1]["text"]


def test_streamed_pieces_add_up_to_stocks_text(server: Server, stock: list[Any]) -> None:
    stream = server.client().completions.create(
        model="tiny", prompt=PROMPTS[0], temperature=0, max_tokens=TOKENS, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == stock[0]["text"]
    assert len(pieces) > 3


def test_eight_clients_at_a_time_get_the_tokens_that_each_would_get_alone(server: Server, stock: list[Any]) -> None:
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(server.complete, PROMPTS))
        assert [list(answer.token_ids) for answer in answers] == [item["tokens"] for item in stock[:-1]]


def test_clients_that_go_away_in_the_middle_take_nothing_from_those_that_wait(server: Server, stock: list[Any]) -> None:
    def leave(prompt: str) -> None:
        with server.client().completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        ) as pieces:
            next(iter(pieces))

    with ThreadPoolExecutor(len(PROMPTS) + 4) as pool:
        leaving = [pool.submit(leave, f"{number} {prompt}") for number, prompt in enumerate(PROMPTS[:4])]
        answers = list(pool.map(server.complete, PROMPTS))
        for each in leaving:
            each.result()
    assert [list(answer.token_ids) for answer in answers] == [item["tokens"] for item in stock[:-1]]
    wait_for(lambda: unfinished(server) == 0)


def test_a_sampled_answer_with_a_seed_can_be_repeated(server: Server) -> None:
    def sample() -> list[str]:
        answer = server.client().completions.create(
            model="tiny", prompt=PROMPTS[1], temperature=1.0, seed=7, n=3, max_tokens=12
        )
        return [choice.text for choice in answer.choices]

    first = sample()
    assert first == sample() and len(set(first)) == 3


def test_statistics_keep_the_budget_and_count_what_is_served(server: Server) -> None:
    before = server.stats()
    server.complete(PROMPTS[2])
    after = server.stats()
    [worker] = after["workers"]
    assert "50 %" in worker["mode"] and worker["rank"] == 0
    assert worker["budget_bytes"] * 2 == worker["total_bytes"]
    assert 0 < worker["resident_bytes"] <= worker["peak_resident_bytes"] <= worker["budget_bytes"]
    assert after["sum"]["decode"]["tokens"] - before["sum"]["decode"]["tokens"] == TOKENS - 1
    assert after["sum"]["bytes_read"] > before["sum"]["bytes_read"]


def test_metrics_are_beside_vllms_own_and_catch_up_with_the_statistics(server: Server) -> None:
    server.complete(PROMPTS[3])
    exact = samples(server.get("/expertier/metrics"))
    text = server.get("/metrics")
    assert "vllm:" in text
    wait_for(lambda: samples(server.get("/metrics")) == exact)
    stats = server.stats()["sum"]
    assert exact["expertier_bytes_read_total"] == stats["bytes_read"]
    assert exact["expertier_misses_total"] == stats["decode"]["misses"] + stats["prefill"]["misses"]
    assert exact["expertier_budget_bytes"] == stats["budget_bytes"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_log_has_a_line_about_the_experts(server: Server) -> None:
    def written() -> bool:
        server.complete(PROMPTS[4])
        return "Expertier, worker 0: " in server.log.read_text()

    wait_for(written)


def test_the_budget_goes_down_and_up_while_requests_are_served_and_no_token_changes(
    server: Server, stock: list[Any]
) -> None:
    total, turned = server.stats()["sum"]["total_bytes"], 0
    with ThreadPoolExecutor(8) as pool:
        under_way = [pool.submit(server.complete, prompt) for prompt in PROMPTS * 2]
        while not turned or not all(future.done() for future in under_way):
            for budget, bytes_of_it in (("25%", total // 4), (total // 2, total // 2)):
                found = json.loads(server.get("/expertier/budget", body={"budget": budget}))["sum"]
                assert found["budget_bytes"] == bytes_of_it
                assert found["resident_bytes"] <= bytes_of_it
                turned += 1
        answers = [future.result() for future in under_way]
    assert [list(answer.token_ids) for answer in answers] == [item["tokens"] for item in stock[:-1] * 2]
    assert turned > 4


def test_a_budget_that_cannot_be_is_refused_and_the_old_one_stays(server: Server) -> None:
    before = server.stats()["sum"]["budget_bytes"]
    assert server.error("/expertier/budget", 400, body={"budget": "1KiB"})["type"] == "BudgetError"
    assert server.error("/expertier/budget", 400, body={"budget": "lots"})["type"] == "BudgetError"
    assert "budget" in server.error("/expertier/budget", 400, body={"size": "1GiB"})["remedy"]
    assert server.error("/expertier/budget", 401, body={"budget": "1GiB"}, key="wrong")
    assert server.error("/expertier/stats", 401, key="")
    assert server.stats()["sum"]["budget_bytes"] == before


def test_bad_requests_are_answered_as_by_stock_and_the_server_goes_on(server: Server, stock: list[Any]) -> None:
    create = server.client().completions.create
    with pytest.raises(openai.NotFoundError):
        create(model="another", prompt="x")
    for bad in ({"prompt": "word " * 2000}, {"prompt": "x", "max_tokens": -1}, {"prompt": "x", "temperature": -1}):
        with pytest.raises(openai.BadRequestError):
            create(model="tiny", **bad)
    with pytest.raises(openai.AuthenticationError):
        server.client().with_options(api_key="wrong").models.list()
    assert list(server.complete(PROMPTS[0]).token_ids) == stock[0]["tokens"]


def test_while_the_disk_fails_requests_end_with_the_cause_and_when_it_recovers_answers_are_stocks(
    server: Server, stock: list[Any]
) -> None:
    [worker] = server.stats()["workers"]
    sidecar = Path(worker["mode"].partition(", sidecar ")[2].partition(",")[0])
    content = sidecar.read_bytes()
    prompt = " ".join(f"{number} words that nobody has said before" for number in range(12))
    request: Any = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
    os.truncate(sidecar, len(content) // 3)
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().completions.create(**request)
        with pytest.raises(openai.APIError) as streamed:  # status 200 has been sent by then: the error comes as a piece
            list(server.client().completions.create(**request, stream=True))
    finally:
        with sidecar.open("r+b") as file:
            file.write(content)
    assert caught.value.status_code == 500
    for error in (caught.value, streamed.value):
        assert "could not be loaded" in error.message and "bytes short of an expert" in error.message
    assert list(server.complete(LONG).token_ids) == stock[PROMPTS.index(LONG)]["tokens"]
    answer = server.client().completions.create(**request)
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_server_that_is_asked_to_stop_leaves_nothing_behind(model: Path, server: Server) -> None:
    roots = [root for root in (Path("/dev/shm"), Path(tempfile.gettempdir())) if os.access(root, os.W_OK)]
    [board] = [path for path in roots[0].glob("expertier-*/0.json") if str(model) in path.read_text()]
    worker = json.loads(board.read_text())["pid"]
    server.stop()
    assert server.process.returncode in (0, -signal.SIGTERM)
    assert not board.parent.exists()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())
