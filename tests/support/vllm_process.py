"""Runs a function of a test module in a process of its own, where vLLM's engine core and worker run, too.

Importing vLLM costs more than starting an engine for a tiny model, so a function starts several engines. Everything in
one process: what the worker raises arrives as it is, and the process's memory is the worker's.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "2",
}


def start(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Start ``function(*arguments)`` in a process of its own; arguments and result are JSON."""
    return subprocess.Popen(
        [sys.executable, __file__, function.__code__.co_filename, function.__name__, json.dumps(arguments)],
        env=os.environ | ENVIRONMENT | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float = 540,
) -> Any:
    """Run ``function(*arguments)`` in a process of its own and return its result.

    Raises
    ------
    AssertionError
        It failed; with the end of what it printed.
    """
    process = start(function, *arguments, environment=environment)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill(process)
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    assert process.returncode == 0 and lines, f"{out[-2000:]}\n{err[-6000:]}"
    return json.loads(lines[-1].removeprefix("RESULT "))


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and all it started, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def engine(model: str, budget: str | int | None = None, **arguments: Any) -> Iterator[Any]:
    """Yield a ``vllm.LLM``: stock without a budget. `expertier` in the arguments are more options."""
    import gc

    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    more = arguments.pop("expertier", {})
    if budget is not None:
        arguments["additional_config"] = {"expertier": {"budget": budget, **more}}
    llm = None
    try:
        llm = LLM(model=model, **({"enforce_eager": True, "max_model_len": 512, "seed": 0} | arguments))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def error_of(call: Callable[[], Any]) -> str:
    """Return type and text of what a call raises, empty if nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS)]
    source, name, given = sys.argv[1:]
    result = runpy.run_path(source)[name](*json.loads(given))
    print(f"RESULT {json.dumps(result)}", flush=True)
    os._exit(0)  # vLLM's atexit handlers wait for processes that were never there
