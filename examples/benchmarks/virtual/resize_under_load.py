"""Requests keep coming while the budget is turned: which fail, which change, how long a change takes.

    python examples/benchmarks/virtual/resize_under_load.py MODEL.gguf --engine llamacpp > resize-llamacpp.json
    python examples/benchmarks/virtual/resize_under_load.py CHECKPOINT --engine vllm > resize-vllm.json

One real server with experts at 50 %, asked by the official client, greedily: every request alone; then eight clients at
a time at that budget, which tells how much answers change only because requests meet in other batches; then eight
clients while ``POST /expertier/budget`` turns the budget down and up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from expertier.comparison.hardware import describe_hardware
from expertier.comparison.prompts import load_texts

sys.path.insert(0, str(Path(__file__).parents[1]))
from servers import ended

_PATIENCE = 300  # seconds until a server must be ready


def command(engine: str, model: Path, port: int, clients: int) -> list[str]:
    """How to start a server whose budget can be turned.

    llama.cpp keeps keys and values in 32 bits: then meeting other requests in a batch changes numbers the least.
    """
    if engine == "vllm":
        ours = {"budget": "50%", "budget_endpoint": True}
        return [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", "model"),
            *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", "--enforce-eager"),
            *("--max-num-seqs", str(clients), "--max-num-batched-tokens", "256", "--no-enable-prefix-caching"),
            *("--dtype", "float32", "--additional-config", json.dumps({"expertier": ours})),
        ]
    return [
        *(sys.executable, "-m", "expertier_llamacpp.server", "--model", str(model), "--model_alias", "model"),
        *("--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(512 * clients), "--n_ubatch", "16"),
        *("--type_k", "0", "--type_v", "0", "--max-sequences", str(clients), "--verbose", "false"),
        *("--expert_budget", "50%", "--budget_endpoint", "true"),
    ]


@contextlib.contextmanager
def server(engine: str, model: Path, clients: int, log: Path) -> Iterator[str]:
    """Run a server and give its address; it is ended with all it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "VLLM_PLUGINS": "expertier"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(engine, model, port, clients), stdout=out, stderr=out, env=environment, start_new_session=True
        )
    with ended(process):
        deadline = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(log.read_text()[-4000:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"


@dataclass
class Turning:
    """Turns the budget until told to stop.

    Attributes
    ----------
    seconds : dict of str to list of float
        Of every request to the endpoint, by the budget asked for: it answers when experts hold no more than that.
    over : int
        Answers that say experts hold more.
    errors : list of str
        What it said instead.
    """

    address: str
    pause: float
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"25%": [], "50%": []})
    over: int = 0
    errors: list[str] = field(default_factory=list)

    def run(self, ended: threading.Event) -> None:
        """Turn it down and up."""
        with httpx.Client(timeout=60) as client:
            while not ended.is_set():
                for budget, seconds in self.seconds.items():
                    started = time.perf_counter()
                    answer = client.post(f"{self.address}/expertier/budget", json={"budget": budget})
                    seconds.append(time.perf_counter() - started)
                    if answer.status_code != 200:
                        self.errors.append(answer.text)
                    else:
                        body = answer.json()
                        stats = body.get("sum", body)
                        share = int(budget[:-1]) / 100
                        self.over += stats["resident_bytes"] > share * stats["total_bytes"]
                    ended.wait(self.pause)


def ask(address: str, prompts: Sequence[str], tokens: int, clients: int) -> tuple[list[str | None], list[str], float]:
    """Answers in the order of the prompts, what failed, and the seconds of all."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    errors: list[str] = []

    def one(prompt: str) -> str | None:
        try:
            answer = client.completions.create(model="model", prompt=prompt, max_tokens=tokens, temperature=0)
        except openai.OpenAIError as error:
            errors.append(f"{type(error).__name__}: {error}")
            return None
        return answer.choices[0].text

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, prompts))
    return answers, errors, time.perf_counter() - started


def main() -> None:
    """Measure and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", choices=["llamacpp", "vllm"], required=True)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--characters", type=int, default=160, help="Of a prompt.")
    parser.add_argument("--pause", type=float, default=0.5, help="Seconds between two changes of the budget.")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is ended, too
    texts = load_texts(options.text, options.model, decode=options.requests, characters=2 * options.characters).decode
    prompts = [
        texts[number % len(texts)].text[7 * number : 7 * number + options.characters]
        for number in range(options.requests)
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        server(options.engine, options.model, options.clients, Path(folder, "log")) as address,
    ):
        ask(address, prompts[: options.clients], options.tokens, options.clients)  # warms up
        alone, _, _ = ask(address, prompts, options.tokens, 1)
        fixed, fixed_errors, fixed_seconds = ask(address, prompts, options.tokens, options.clients)
        turning, ended = Turning(address, options.pause), threading.Event()
        thread = threading.Thread(target=turning.run, args=(ended,))
        thread.start()
        turned, turned_errors, turned_seconds = ask(address, prompts, options.tokens, options.clients)
        ended.set()
        thread.join()
        stats = httpx.get(f"{address}/expertier/stats", timeout=60).json()

    def arm(answers: list[str | None], errors: list[str], seconds: float) -> dict[str, Any]:
        return {
            "requests": len(prompts),
            "failed": len(errors),
            "unlike_alone": sum(answer != expected for answer, expected in zip(answers, alone, strict=True)),
            "seconds": seconds,
            "errors": errors,
        }

    record = {
        "hardware": asdict(describe_hardware(options.model)),
        "engine": options.engine,
        "model": options.model.name,
        "clients": options.clients,
        "tokens": options.tokens,
        "fixed": arm(fixed, fixed_errors, fixed_seconds),
        "turned": arm(turned, turned_errors, turned_seconds)
        | {
            "changes": sum(map(len, turning.seconds.values())),
            "refused": turning.errors,
            "over_budget": turning.over,
            "settle_seconds": {
                budget: {"median": statistics.median(seconds), "most": max(seconds)}
                for budget, seconds in turning.seconds.items()
            },
        },
        "evictions": stats.get("sum", stats)["evictions"],
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
