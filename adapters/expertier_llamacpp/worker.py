"""Measures one arm of a comparison: ``python -m expertier_llamacpp.worker``, a JSON job on stdin, a record on stdout.

A process of its own per run: nothing is warm that was not warmed by the run itself, and a memory limit that was put on
the process covers everything it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as C  # noqa: N812 - the name llama-cpp-python itself uses for its C interface
from numpy.typing import NDArray

from expertier.comparison.job import answer_job
from expertier.comparison.quality import DecodedLogits
from expertier.errors import ExpertierError
from expertier.telemetry import Stats
from expertier_llamacpp.adapter import can_repack
from expertier_llamacpp.llama import Llama


def main() -> None:
    """Run the job that the comparison's runner sends."""
    answer_job(measure)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one arm; with ``prepare`` in the job only load it.

    Parameters
    ----------
    job : dict
        ``model``, ``ours``, ``settings``, ``options`` (Expertier's), ``n_ubatch``, ``threads``, ``long_text``,
        ``texts``, ``long_prompt``, ``short_prompt`` and ``tokens`` (per text).

    Returns
    -------
    dict
        Fields of :class:`expertier.comparison.records.Figures`.
    """
    model = Path(job["model"])
    if job.get("prepare"):
        # What is made once per model (the repacked sidecar) must not be made inside a measurement.
        _load(job, model).close()
        return {}
    started = time.perf_counter()
    llama = _load(job, model)
    load_seconds = time.perf_counter() - started
    try:
        record = _measure_loaded(job, llama)
    finally:
        llama.close()
    return {"load_seconds": load_seconds, "kernels": _kernels(job, model, llama), **record}


def _load(job: dict[str, Any], model: Path) -> llama_cpp.Llama:
    engine: dict[str, Any] = {
        "n_ctx": job["long_prompt"] + job["short_prompt"] + job["tokens"] + 64,
        "n_batch": max(512, job["n_ubatch"]),
        "n_ubatch": job["n_ubatch"],
        "n_threads": job["threads"],
        "n_threads_batch": job["threads"],
        "verbose": False,
    }
    if job["ours"]:
        return Llama(str(model), **engine, **{f"expert_{name}": value for name, value in job["options"].items()})
    repack = job["settings"].get("repack")
    stock_load = C.llama_model_load_from_file

    def load(path: bytes, params: Any) -> Any:
        if repack is not None:
            params.use_extra_bufts = repack
        return stock_load(path, params)

    C.llama_model_load_from_file = load  # Llama() has no argument for it
    try:
        return llama_cpp.Llama(str(model), **engine)
    finally:
        C.llama_model_load_from_file = stock_load


def _kernels(job: dict[str, Any], model: Path, llama: llama_cpp.Llama) -> str:
    # Stock and ours compute alike, bit by bit, at the same setting of use_extra_bufts.
    repack = llama._kernels.extra_buffer_types if isinstance(llama, Llama) else job["settings"].get("repack", True)
    return "repacked" if repack and can_repack(model) else "plain"


def _measure_loaded(job: dict[str, Any], llama: llama_cpp.Llama) -> dict[str, Any]:
    texts = [_tokens(llama, text, job["short_prompt"] + job["tokens"]) for text in job["texts"]]
    long_prompt = _tokens(llama, job["long_text"], job["long_prompt"])
    logits = hashlib.sha256()
    fed = hashlib.sha256()
    choices: list[int] = []
    ttft_short: list[float] = []
    token_seconds: list[float] = []
    logits_file = DecodedLogits(job)
    read_before_decode = 0
    decode_read = 0
    offload = _OffloadDelta(llama) if job["ours"] else None

    def step(tokens: list[int]) -> tuple[float, NDArray[np.float32]]:
        begin = time.perf_counter()
        llama.eval(tokens)
        seconds = time.perf_counter() - begin
        row = np.ctypeslib.as_array(C.llama_get_logits(llama.ctx), (llama.n_vocab(),))
        logits.update(row.tobytes())
        fed.update(np.array(tokens, np.int32).tobytes())
        choices.append(int(row.argmax()))
        return seconds, row

    def decode(text: int, tokens: list[int], start: int) -> Iterator[float]:
        for position in range(start, len(tokens)):
            seconds, row = step([tokens[position]])
            if position + 1 < len(tokens):
                logits_file.add(text, tokens[position + 1], row)
            yield seconds

    # The long prompt comes first: it is what a user meets after loading, and afterwards all arms are warm.
    ttft_long, _ = step(long_prompt)
    for text, tokens in enumerate(texts):
        llama.reset()  # type: ignore[no-untyped-call]
        ttft_short.append(step(tokens[: job["short_prompt"]])[0])
        read_before_decode = _read_bytes()
        if offload is not None:
            offload.begin()
        # Real text is fed, whatever the model would have said: the same tokens in all arms, and no loops.
        token_seconds += decode(text, tokens, job["short_prompt"])
        if offload is not None:
            offload.end()
        decode_read += _read_bytes() - read_before_decode
    logits_file.close()
    return {
        "ttft_long_seconds": ttft_long,
        "ttft_short_seconds": ttft_short,
        "token_seconds": token_seconds,
        "peak_rss_bytes": _status_bytes("VmHWM"),
        "read_bytes": _read_bytes(),
        "decode_read_bytes": decode_read,
        "tokens_digest": fed.hexdigest(),
        "logits_digest": logits.hexdigest(),
        "choices": choices,
        "offload": offload.record(len(token_seconds)) if offload is not None else None,
    }


class _OffloadDelta:
    """Sums Expertier's counters over the decode parts of a run."""

    def __init__(self, llama: llama_cpp.Llama) -> None:
        assert isinstance(llama, Llama)
        self._llama = llama
        self._before = Stats()
        self._hits = self._ready = self._requests = self._misses = self._bytes = 0
        self._stall = 0.0
        virtual = llama.virtual
        self._mass = np.zeros(0 if virtual is None else len(virtual.mass))
        self._mass_before = self._mass

    def begin(self) -> None:
        self._before = self._llama.offload.stats()
        if self._llama.virtual is not None:
            self._mass_before = self._llama.virtual.mass.copy()

    def end(self) -> None:
        after, before = self._llama.offload.stats(), self._before
        self._ready += after.decode.ready_hits - before.decode.ready_hits
        self._hits += after.decode.ready_hits + after.decode.late - before.decode.ready_hits - before.decode.late
        self._requests += after.decode.requests - before.decode.requests
        self._misses += after.decode.misses - before.decode.misses
        self._stall += after.decode.stall_seconds - before.decode.stall_seconds
        self._bytes += after.bytes_read - before.bytes_read
        if self._llama.virtual is not None:
            self._mass = self._mass + self._llama.virtual.mass - self._mass_before

    def record(self, tokens: int) -> dict[str, Any]:
        stats = self._llama.offload.stats()
        return {
            "mode": self._llama.mode_line(),
            "budget_bytes": stats.budget_bytes,
            "peak_resident_bytes": stats.peak_resident_bytes,
            "total_bytes": stats.total_bytes,
            "hit_ratio": self._hits / self._requests if self._requests else None,
            "ready_hit_ratio": self._ready / self._requests if self._requests else None,
            "misses_per_token": self._misses / tokens,
            "stall_ms_per_token": 1e3 * self._stall / tokens,
            "read_bytes_per_token": self._bytes / tokens,
            **self._virtual(tokens),
        }

    def _virtual(self, tokens: int) -> dict[str, Any]:
        virtual, quality = self._llama.virtual, self._llama.quality
        if virtual is None:
            return {}
        return {
            "bias": None if virtual.hard else virtual.bias,
            "calibrated_bias": None if quality is None else quality.stats(virtual).calibrated_bias,
            "substituted": (self._mass / tokens).tolist(),
        }


def _tokens(llama: llama_cpp.Llama, text: str, count: int) -> list[int]:
    tokens: list[int] = llama.tokenize(text.encode(), add_bos=False)[:count]
    if len(tokens) < count:
        raise ExpertierError(
            f"A text has only {len(tokens)} tokens, {count} are needed.", "Give longer texts or ask for fewer tokens."
        )
    return tokens


def _read_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
