"""Runs stock vLLM and Expertier one after the other in one process; a test starts it with :func:`run_arms`.

Importing vLLM costs more than starting an engine for a tiny model, so a process runs all arms of a model. The engine
core runs in this process too: what it raises arrives as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROMPT_LENGTHS = (3, 61, 17, 1, 40, 9)
NEW_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One engine: a name, a checkpoint, the value of ``expertier`` (``None``: stock) and more engine arguments."""

    name: str
    model: str
    expertier: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of an arm: tokens of every prompt and the manager's counters, or the type and text of an error."""

    tokens: list[list[int]] | None = None
    stats: dict[str, Any] | None = None
    error: str = ""


def run_arms(arms: Sequence[Arm], *, timeout: float = 540) -> dict[str, Outcome]:
    """Run arms in a process of their own, in order.

    Parameters
    ----------
    arms : sequence of Arm
        At most one model, or the process collects the memory of all.
    timeout : float
        Seconds for everything.

    Returns
    -------
    dict of str to Outcome
        By the arms' names.
    """
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "2",
    }
    process = subprocess.run(
        [sys.executable, str(Path(__file__))],
        input=json.dumps([asdict(arm) for arm in arms]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    assert process.returncode == 0 and lines, f"{process.stdout[-2000:]}\n{process.stderr[-6000:]}"
    return {name: Outcome(**outcome) for name, outcome in json.loads(lines[-1]).items()}


def _run(arm: Arm) -> Outcome:
    import gc

    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    additional = {} if arm.expertier is None else {"additional_config": {"expertier": arm.expertier}}
    llm = None
    try:
        # Prompts longer than a step: they are computed in chunks, and chunks share steps with decoding.
        llm = LLM(
            model=arm.model,
            **{
                "enforce_eager": True,
                "dtype": "bfloat16",
                "max_model_len": 128,
                "max_num_batched_tokens": 32,
                "max_num_seqs": 4,
                "seed": 0,
            }
            | additional
            | arm.engine,
        )
        rng = np.random.default_rng(7)
        prompts = [{"prompt_token_ids": rng.integers(0, 256, length).tolist()} for length in PROMPT_LENGTHS]
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        stats = None if arm.expertier is None else llm.collective_rpc("expertier_stats")[0]
        return Outcome([list(answer.outputs[0].token_ids) for answer in answers], stats)
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}")
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    jobs = [Arm(**job) for job in json.load(sys.stdin)]
    print(json.dumps({job.name: asdict(_run(job)) for job in jobs}), flush=True)
