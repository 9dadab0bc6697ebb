"""Many clients, one server, experts larger than memory: who gets stock's answer.

    python examples/benchmarks/vllm_serving.py CHECKPOINT --limit 4000MiB --requests 100 --clients 8 --out DIR

Real ``vllm serve`` processes, one after the other, asked by the official client:

* stock without a limit, twice: what the same engine answers when the same requests meet in other batches,
* stock under the limit, which may be killed: that is a result,
* Expertier under the limit with budget "auto".

The arms with a limit run in a control group, page cache included, with caches dropped before. Arms that an earlier
call has left in DIR are kept, so that one that needs the whole machine can wait for it (``--arm stock``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expertier.budget import format_bytes, parse_budget
from expertier.catalog import read_catalog
from expertier.comparison.hardware import describe_hardware
from expertier.comparison.limits import find_confinement
from expertier.comparison.page_cache import drop_caches
from expertier.comparison.prompts import load_texts

sys.path.insert(0, str(Path(__file__).parent))
from servers import ended

_PATIENCE = 900  # seconds until a server must be ready
ARMS = ("stock", "stock-again", "stock-limited", "expertier")
console = Console(stderr=True)


@dataclass
class Result:
    """What one server did.

    Attributes
    ----------
    arm : str
        Its name.
    limit : int or None
        Memory limit in bytes.
    status : str
        ``answered``, ``killed`` or ``failed``.
    answers : dict of int to list of int
        Tokens by request.
    errors : list of str
        What clients were told instead.
    first_token, whole : list of float
        Seconds until the first token and the last.
    seconds : float
        From the first request to the last answer.
    peak_group : int or None
        High-water mark of the control group, page cache included, bytes.
    peak_worker : int
        Most anonymous memory of the process that computes, bytes.
    stats : dict
        Expertier's counters.
    """

    arm: str
    limit: int | None
    status: str = "answered"
    answers: dict[int, list[int]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_group: int | None = None
    peak_worker: int = 0
    stats: dict[str, Any] = field(default_factory=dict)


class Watcher(threading.Thread):
    """Follows the memory of a server's processes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(process.pid)
        self._ended = threading.Event()
        self.peak = 0

    def run(self) -> None:
        while not self._ended.wait(0.2):
            with contextlib.suppress(psutil.Error):
                for process in [self._process, *self._process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error, OSError):
                        memory = process.memory_info()
                        self.peak = max(self.peak, memory.rss - memory.shared)

    def end(self) -> None:
        self._ended.set()
        self.join()


@contextlib.contextmanager
def server(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server; it is ended with all it started."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "VLLM_PLUGINS": "expertier"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over --cache
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    with ended(process):
        yield process


def wait_until_ready(client: openai.OpenAI, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server came up."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(openai.OpenAIError):
            client.models.list()
            return True
        time.sleep(0.5)
    return False


def ask(client: openai.OpenAI, number: int, prompt: str, tokens: int, result: Result) -> None:
    """One request of one client."""
    started = time.perf_counter()
    first: float | None = None
    ids: list[int] = []
    try:
        stream = client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        for part in stream:
            if part.choices:
                first = first or time.perf_counter() - started
                ids += getattr(part.choices[0], "token_ids", None) or []
    except openai.OpenAIError as error:
        result.errors.append(f"{type(error).__name__}: {error}")
        return
    result.answers[number] = ids
    result.first_token.append(first or 0.0)
    result.whole.append(time.perf_counter() - started)


def run(arm: str, model: Path, limit: int | None, prompts: list[str], options: argparse.Namespace) -> Result:
    """Start a server, let the clients ask, and end it."""
    result = Result(arm=arm, limit=limit)
    way, reasons = find_confinement()
    if way is None:
        raise SystemExit(f"No memory limit can be enforced here: {reasons}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", "model"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", "--enforce-eager"),
        *("--max-num-seqs", str(options.clients), "--max-num-batched-tokens", "256", "--no-enable-prefix-caching"),
    ]
    command += ["--kv-cache-memory-bytes", str(parse_budget(options.cache, 0))]
    if arm == "expertier":
        command += ["--additional-config", json.dumps({"expertier": {"budget": "auto"}})]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=1800)
    drop_caches([path for path in model.iterdir() if path.is_file()])
    group = way.open(limit)
    try:
        with server(group.wrap(command), options.out / f"{arm}.log") as process:
            watcher = Watcher(process)
            watcher.start()
            if wait_until_ready(client, process):
                started = time.perf_counter()
                columns = (TextColumn(arm), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
                with Progress(*columns, console=console) as bar, ThreadPoolExecutor(options.clients) as clients:
                    task = bar.add_task(arm, total=len(prompts))

                    def one(number: int) -> None:
                        ask(client, number, prompts[number], options.tokens, result)
                        bar.advance(task)

                    list(clients.map(one, range(len(prompts))))
                result.seconds = time.perf_counter() - started
                if arm == "expertier":
                    result.stats = client.get("../expertier/stats", cast_to=object)  # type: ignore[assignment]
            group.watch(process.pid)
            watcher.end()
            result.peak_worker = watcher.peak
        usage = group.usage()
    finally:
        group.close()
    result.peak_group = usage.peak_bytes
    if len(result.answers) < len(prompts):
        result.status = "killed" if usage.oom_kills else "failed"
    return result


def summary(results: dict[str, Result], experts: int) -> dict[str, Any]:
    """What a reader looks for first."""
    reference = results["stock"].answers

    def same(arm: str) -> int:
        return sum(results[arm].answers.get(number) == ids for number, ids in reference.items())

    found: dict[str, Any] = {
        "experts_bytes": experts,
        "experts_over_limit": experts / (results["expertier"].limit or 1),
        "requests": len(reference),
    }
    for arm, result in results.items():
        found[arm] = {
            "status": result.status,
            "answered": len(result.answers),
            "errors": len(result.errors),
            "tokens_equal_to_stock": same(arm),
            "seconds": round(result.seconds, 1),
            "peak_group_bytes": result.peak_group,
            "peak_worker_anonymous_bytes": result.peak_worker,
        }
        if result.first_token:
            found[arm]["first_token_p50_p99"] = [
                round(statistics.median(result.first_token), 2),
                round(sorted(result.first_token)[int(0.99 * (len(result.first_token) - 1))], 2),
            ]
    return found


def earlier(path: Path) -> dict[str, Result]:
    """Arms of an earlier call."""
    if not path.exists():
        return {}
    arms = {name: Result(**arm) for name, arm in json.loads(path.read_text())["arms"].items()}
    for arm in arms.values():
        arm.answers = {int(number): tokens for number, tokens in arm.answers.items()}
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", required=True, help="memory for the server, e.g. 2400MiB")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--characters", type=int, default=200, help="of a prompt")
    parser.add_argument("--cache", default="1GiB", help="KV cache of each server")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--arm", action="append", choices=ARMS, help="only these")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    limit = parse_budget(options.limit, 0)
    experts = read_catalog(options.model).total_expert_bytes
    texts = load_texts(options.text, options.model, decode=options.requests, characters=2 * options.characters)
    prompts = [
        texts.decode[number % len(texts.decode)].text[(start := 7 * number) : start + options.characters]
        for number in range(options.requests)
    ]
    arms = dict(zip(ARMS, (None, None, limit, limit), strict=True))
    results = earlier(options.out / "serving.json")
    for arm, of in arms.items():
        if options.arm and arm not in options.arm:
            continue
        console.print(f"{arm}: limit {format_bytes(of) if of else 'none'}, experts {format_bytes(experts)}")
        results[arm] = run(arm, options.model, of, prompts, options)
        record = {
            "hardware": asdict(describe_hardware(options.model)),
            "summary": summary(results, experts) if {"stock", "expertier"} <= results.keys() else None,
            "arms": {name: asdict(result) for name, result in results.items()},
        }
        (options.out / "serving.json").write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"{arm}: {results[arm].status}, {len(results[arm].answers)} answers")
    if record["summary"] is not None:
        print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
