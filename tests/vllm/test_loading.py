"""Loading leaves the experts alone: what is read, what is kept in memory, and what is left behind when it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.tiny_hf import HfSpec, write_hf
from support.tiny_hub import NAME, hub
from support.vllm_process import engine, error_of, kill, run, start
from support.vllm_rows import sidecar_rows, stock_rows

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

SPEC = HfSpec(layers=3)
# Experts of 1.5 MiB, 288 MiB together; everything else is small.
LARGE = HfSpec(layers=3, experts=64, hidden=512, intermediate=512, head=64)
EXPERT = 3 * 2 * LARGE.hidden * LARGE.intermediate
MIB = 1 << 20


def answer(llm: Any) -> list[int]:
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": list(range(1, 30))}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    tokens: list[int] = list(llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids)
    return tokens


def sidecars(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if ".expertier" in path.name)


# ---- what the sidecar holds


def rows_of_stock(model: str) -> dict[str, Any]:
    """Digests of every expert's row as stock holds it after processing, and of what the sidecar has."""
    with engine(model) as llm:
        stock = stock_rows(llm)
    with engine(model, "50%") as llm:
        ours = sidecar_rows(llm)
    return {"stock": stock, "ours": ours}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss_bf16"])
def test_the_sidecar_holds_the_very_bytes_that_stock_computes_on(tmp_path: Path, family: str) -> None:
    rows = run(rows_of_stock, str(write_hf(tmp_path, HfSpec(family=family, layers=2, files=2))))
    assert len(rows["stock"]) >= 2 * 2 * 16
    assert rows["ours"] == rows["stock"]


# ---- what is read


def start_twice(model: str) -> dict[str, Any]:
    from expertier.comparison.page_cache import cached_bytes, drop_caches

    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("rchar:")).split()[1])

    files = sorted(Path(model).glob("*.safetensors"))
    outcome: dict[str, Any] = {}
    for attempt in ("first", "second"):
        drop_caches(files)
        before = bytes_read()
        with engine(model, "25%") as llm:
            outcome[f"{attempt} read"] = bytes_read() - before
            outcome[f"{attempt} cached"] = sum(cached_bytes(file) for file in files)
            outcome[attempt] = answer(llm)
    with engine(model) as llm:
        outcome["stock"] = answer(llm)
    return outcome


def test_a_second_start_reads_nothing_of_the_experts(checkpoint: Callable[[HfSpec], Path]) -> None:
    model = checkpoint(LARGE)
    outcome = run(start_twice, str(model))
    assert outcome["first"] == outcome["second"] == outcome["stock"]
    assert len(sidecars(model)) == 1
    experts = LARGE.layers * LARGE.experts * EXPERT
    others = sum(file.stat().st_size for file in model.glob("*.safetensors")) - experts
    assert outcome["first read"] > experts
    assert outcome["second read"] < experts // 4  # what Python imports on the way is in it
    for attempt in ("first", "second"):  # experts pass the page cache by, and nothing reads them ahead
        assert outcome[f"{attempt} cached"] < others + experts // 16


# ---- memory


def peak(model: str, budget: str | int) -> dict[str, int]:
    """Peak memory of a process that starts an engine and answers."""

    def status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) << 10
        raise AssertionError(key)

    with engine(model, budget, max_num_batched_tokens=64, max_num_seqs=2) as llm:
        loaded = status("VmHWM")
        answer(llm)
        return {"loaded": loaded, "answered": status("VmHWM")}


def test_memory_stays_bounded_while_the_sidecar_is_written_and_after(
    checkpoint: Callable[[HfSpec], Path], tmp_path: Path
) -> None:
    """Compared with a model of the same shape with few experts: what is left is what experts cost."""
    few = HfSpec(layers=3, experts=4, hidden=512, intermediate=512, head=64)
    reference = run(peak, str(write_hf(tmp_path / "few", few)), "100%")
    budget = 40 * EXPERT
    model = write_hf(tmp_path / "many", LARGE)
    first = run(peak, str(model), budget)
    second = run(peak, str(model), budget)
    assert LARGE.layers * LARGE.experts * EXPERT > 280 * MIB
    for outcome in (first, second):
        assert outcome["loaded"] - reference["loaded"] < budget + 32 * MIB
        assert outcome["answered"] - reference["answered"] < budget + 32 * MIB


# ---- what goes wrong


def load(model: str, options: dict[str, Any]) -> list[int]:
    with engine(model, "50%", expertier=options) as llm:
        return answer(llm)


def test_a_killed_writer_leaves_no_sidecar_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model", LARGE)
    process = start(load, str(model), {})
    try:
        deadline = time.monotonic() + 120
        while not any(path.name.endswith(".part") and path.stat().st_size > MIB for path in sidecars(model)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        kill(process)
    assert not [path for path in sidecars(model) if path.suffix == ".expertier"]
    assert run(load, str(model), {})
    assert [path.suffix for path in sidecars(model)] == [".expertier"]


def load_with_small_files(model: str) -> dict[str, str]:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))  # to a writer like a disk that is full
    return {"error": error_of(lambda: load(model, {"sidecar_dir": f"{model}/side"}))}


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    model = write_hf(tmp_path, SPEC)
    error = run(load_with_small_files, str(model))["error"]
    assert error.startswith("SidecarError: The sidecar ")
    assert "Make room." in error
    assert list((model / "side").iterdir()) == []


def disk_that_fails(model: str, workers: list[int], arguments: dict[str, Any]) -> list[Any]:
    """Cut the sidecar of one worker after the other off while serving, and mend it."""
    from vllm import SamplingParams

    outcomes = []
    with engine(model, "25%", **arguments) as llm:
        good = answer(llm)
        for worker in workers:
            mode = llm.collective_rpc("expertier_stats")[worker]["mode"]
            (sidecar,) = [path for path in sidecars(Path(model)) if f"sidecar {path}," in mode]
            content = sidecar.read_bytes()
            os.truncate(sidecar, len(content) // 3)
            prompts = [{"prompt_token_ids": list(range(index, 60 + index))} for index in range(3)]
            sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            broken = [
                (answer.finished, answer.outputs[0].finish_reason, answer.outputs[0].stop_reason)
                for answer in llm.generate(prompts, sampling, use_tqdm=False)
            ]
            with sidecar.open("r+b") as file:
                file.write(content)
            outcomes.append({"good": good, "broken": broken, "mended": answer(llm)})
    return outcomes


def check_that_only_those_requests_ended(outcome: dict[str, Any]) -> None:
    assert len(outcome["broken"]) == 3
    for finished, reason, text in outcome["broken"]:
        assert finished
        assert reason == "error"
        assert "could not be loaded" in text
        assert "bytes short of an expert" in text
    assert outcome["mended"] == outcome["good"]


def test_a_disk_that_fails_ends_its_requests_and_the_engine_lives_on(tmp_path: Path) -> None:
    [outcome] = run(disk_that_fails, str(write_hf(tmp_path, SPEC)), [0], {})
    check_that_only_those_requests_ended(outcome)


@pytest.mark.parametrize(
    ("workers", "arguments"),
    [
        pytest.param([1], {"tensor_parallel_size": 2}, id="tensor parallel"),
        # Compiled because of what stands in test_parity.py.
        pytest.param([0, 1], {"pipeline_parallel_size": 2, "enforce_eager": False}, id="stages of a pipeline"),
    ],
)
def test_a_disk_that_fails_for_one_of_two_workers_blocks_neither_and_its_cause_is_told(
    tmp_path: Path, workers: list[int], arguments: dict[str, Any]
) -> None:
    """Workers wait for each other, so the one without its expert must not leave."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    model = str(write_hf(tmp_path, SPEC))
    outcomes = run(disk_that_fails, model, workers, arguments, environment=environment)
    assert len(outcomes) == len(workers)
    for outcome in outcomes:
        check_that_only_those_requests_ended(outcome)


def worker_that_is_killed(model: str) -> dict[str, Any]:
    import psutil

    with engine(model, "25%", tensor_parallel_size=2) as llm:
        assert answer(llm)
        boards = [json.loads(path.read_text()) for path in Path("/dev/shm").glob("expertier-*/*.json")]
        ours = {child.pid for child in psutil.Process().children(recursive=True)}
        first, second = (psutil.Process(board["pid"]) for board in boards if board["pid"] in ours)
        second.kill()
        error = error_of(lambda: answer(llm))
        return {"error": error, "left": [process.pid for process in psutil.wait_procs([first], timeout=60)[1]]}


def test_a_killed_worker_is_an_error_and_takes_the_other_one_with_it(tmp_path: Path) -> None:
    outcome = run(
        worker_that_is_killed, str(write_hf(tmp_path, SPEC)), environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    )
    assert outcome["error"].startswith("EngineDeadError")
    assert outcome["left"] == []


def budget_auto(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    with engine(model, "auto", **arguments) as llm:
        before = llm.collective_rpc("expertier_stats")[0]["budget_bytes"]
        tokens = answer(llm)
        resized = llm.collective_rpc("expertier_resize", args=("25%",))[0]
        again = answer(llm)
        refused = llm.collective_rpc("expertier_resize", args=(10,))[0]
        llm.collective_rpc("expertier_resize", args=("50%",))
        llm.collective_rpc("expertier_undo_resize")  # as if another worker had refused it
        stats = llm.collective_rpc("expertier_stats")[0]
    return {
        "before": before,
        "tokens": tokens,
        "resized": resized,
        "again": again,
        "refused": refused,
        "stats": stats,
    }


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine with budget "auto" whose model is on a hub, beside the same weights in another form."""
    model = write_hf(tmp_path_factory.mktemp("hub"), dataclasses.replace(SPEC, files=2))
    (model / "pytorch_model.bin").write_bytes(b"not wanted")
    own, home = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("home")
    with hub(model) as server:
        outcome = run(budget_auto, NAME, {"download_dir": str(own)}, environment=server.environment(home))
    return outcome, server.fetched, own, home


def test_a_model_that_is_named_is_fetched_as_stock_does_it(named: Any) -> None:
    _, fetched, own, home = named
    assert {name for name in fetched if name.endswith(".safetensors")} and "pytorch_model.bin" not in fetched
    assert list(own.rglob("*.safetensors")) and not list(home.rglob("*.safetensors"))


def test_budget_auto_takes_what_is_left_and_a_resize_holds(named: Any) -> None:
    outcome = named[0]
    total = outcome["stats"]["total_bytes"]
    assert outcome["before"] == total  # a model so small fits everywhere
    assert outcome["resized"] == {"budget_bytes": total // 4}
    assert outcome["stats"]["budget_bytes"] == total // 4
    assert outcome["stats"]["resident_bytes"] <= total // 4
    assert outcome["again"] == outcome["tokens"]
    assert outcome["refused"]["error"]["type"] == "BudgetError"
