"""Measures one arm of a comparison: ``python -m expertier_vllm.worker``, a JSON job on stdin, a record on stdout.

A process of its own per run, with vLLM's worker process below it: nothing is warm that was not warmed by the run
itself, and a memory limit that was put on the process covers everything it starts. vLLM takes long to start, so one run
measures all numbers of requests, one after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from expertier.comparison.job import answer_job
from expertier.comparison.quality import DecodedLogits, wants_logits
from expertier.errors import ExpertierError
from expertier.telemetry import PhaseCounters, Stats
from expertier.telemetry.metrics import Record
from expertier_vllm.metrics import substituted_mass, summed
from expertier_vllm.offline import GIVEN_TOKENS, GivenTexts, Steps, greedy, open_engine, prepare_environment

_CACHE_BYTES = 256 << 20
_KERNELS = "eager"


def main() -> None:
    """Run the job that the comparison's runner sends."""
    answer_job(measure)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one arm; with ``prepare`` in the job only load it.

    Parameters
    ----------
    job : dict
        ``model``, ``ours``, ``settings`` (stock's: arguments of the engine), ``options`` (Expertier's), ``n_ubatch``,
        ``threads``, ``long_text``, ``texts``, ``long_prompt``, ``short_prompt``, ``tokens`` (per request) and
        ``requests`` (numbers of requests at a time).

    Returns
    -------
    dict
        Fields of :class:`expertier.comparison.records.Figures`.
    """
    prepare_environment(job["threads"])
    started = time.perf_counter()
    llm = open_engine(
        Path(job["model"]),
        job["options"] if job["ours"] else None,
        context=job["long_prompt"] + job["short_prompt"] + job["tokens"] + 64,
        step_tokens=job["n_ubatch"],
        requests=max(job["requests"]),
        cache_bytes=_CACHE_BYTES,
        processors=(GIVEN_TOKENS,) if wants_logits(job) else (),
        more=job["settings"],
    )
    load_seconds = time.perf_counter() - started
    try:
        return {} if job.get("prepare") else {"load_seconds": load_seconds, **_Measurement(job, llm).run()}
    finally:
        llm.llm_engine.engine_core.shutdown()


class _Measurement:
    """All that is measured with a loaded engine."""

    def __init__(self, job: dict[str, Any], llm: Any) -> None:
        self._job = job
        self._llm = llm
        self._fed = hashlib.sha256()
        self._got = hashlib.sha256()
        self._choices: list[int] = []
        self._decode = Stats()
        self._decode_read = 0

    def run(self) -> dict[str, Any]:
        job = self._job
        # The long prompt comes first: it is what a user meets after loading, and afterwards all arms are warm.
        first = self._serve([self._tokens(job["long_text"], 0, job["long_prompt"])], 1)
        loads = [self._alone()] + [self._together(count) for count in job["requests"] if count > 1]
        alone = loads[0]
        found = {
            "ttft_long_seconds": first.answers[0].at[0],
            "ttft_short_seconds": alone["ttft_seconds"],
            "token_seconds": alone["token_seconds"],
            "peak_rss_bytes": max(_status_bytes(process, "VmHWM") for process in _processes()),
            "read_bytes": _read_bytes(),
            "decode_read_bytes": self._decode_read,
            "tokens_digest": self._fed.hexdigest(),
            "logits_digest": self._got.hexdigest(),
            "choices": self._choices,
            "kernels": _KERNELS,
            "offload": self._offload(len(alone["token_seconds"])) if job["ours"] else None,
            "loads": [load for load in loads if load["requests"] in job["requests"]],
        }
        if wants_logits(job):
            lossy = self._read_texts()
            if found["offload"] is not None:
                found["offload"] |= lossy
        return found

    def _read_texts(self) -> dict[str, Any]:
        """Decode the texts as they are, after all that is timed, and leave what the model said to be judged.

        Answers are another matter: after the first token that differs, they are answers to different texts.
        """
        before = self._records()
        length, count = self._job["short_prompt"], self._job["tokens"]
        with contextlib.closing(DecodedLogits(self._job)) as file:
            for index, text in enumerate(self._job["texts"]):
                tokens = self._tokens(text, 0, length + count)
                given = GivenTexts(self._llm, [tokens[:-1]], prompt=length)
                for place, _ in enumerate(given):
                    if place:  # the first is what a prompt gives
                        file.add(index, tokens[length + place], given.logits())
        after = self._records()
        if not after or after[0]["virtual"] is None:
            return {}
        decoded = len(self._job["texts"]) * (count - 1)
        quality = after[0].get("quality") or {}
        return {
            "bias": after[0]["virtual"]["bias"],
            "calibrated_bias": quality.get("calibrated_bias"),
            "substituted": ((substituted_mass(after) - substituted_mass(before)) / decoded).tolist(),
        }

    def _alone(self) -> dict[str, Any]:
        """One request at a time, a text after the other; what decoding alone does is told apart from the prompts."""
        before, read, runs = self._stats(), _read_bytes(), []
        for text in self._job["texts"]:
            steps = self._start([self._tokens(text, 0, self._job["short_prompt"])], self._job["tokens"])
            at_first: tuple[Stats, int] | None = None
            for _ in steps:
                if at_first is None and steps.answers[0].tokens:
                    at_first = self._stats(), _read_bytes()
            if at_first is not None:
                _add(self._decode, self._stats(), at_first[0])
                self._decode_read += _read_bytes() - at_first[1]
            self._finish(steps)
            runs.append(steps)
        return self._load(1, runs, before, read)

    def _together(self, count: int) -> dict[str, Any]:
        """So many requests made at the same moment."""
        before, read = self._stats(), _read_bytes()
        texts, length = self._job["texts"], self._job["short_prompt"]
        prompts = [self._tokens(texts[index % len(texts)], index // len(texts), length) for index in range(count)]
        return self._load(count, [self._serve(prompts, self._job["tokens"])], before, read)

    def _start(self, prompts: Sequence[Sequence[int]], tokens: int) -> Steps:
        for prompt in prompts:
            self._fed.update(np.array(prompt, np.int32).tobytes())
        return Steps(self._llm, prompts, greedy(tokens))

    def _finish(self, steps: Steps) -> Steps:
        for answer in steps.answers:
            self._got.update(np.array(answer.tokens, np.int32).tobytes())
            self._choices += answer.tokens
        return steps

    def _serve(self, prompts: Sequence[Sequence[int]], tokens: int) -> Steps:
        steps = self._start(prompts, tokens)
        for _ in steps:
            pass
        return self._finish(steps)

    def _load(self, count: int, runs: Sequence[Steps], before: Stats, read: int) -> dict[str, Any]:
        answers = [answer for steps in runs for answer in steps.answers]
        now = self._stats()
        needed = now.decode.requests + now.prefill.requests - before.decode.requests - before.prefill.requests
        misses = now.decode.misses + now.prefill.misses - before.decode.misses - before.prefill.misses
        ready = now.decode.ready_hits + now.prefill.ready_hits - before.decode.ready_hits - before.prefill.ready_hits
        stall = now.decode.stall_seconds + now.prefill.stall_seconds
        return {
            "requests": count,
            "seconds": sum(steps.seconds for steps in runs),
            "tokens": sum(len(answer.tokens) for answer in answers),
            "ttft_seconds": [answer.at[0] for answer in answers],
            "token_seconds": [
                later - earlier for answer in answers for earlier, later in zip(answer.at, answer.at[1:], strict=False)
            ],
            "read_bytes": _read_bytes() - read,
            "hit_ratio": 1 - misses / needed if needed else None,
            "ready_hit_ratio": ready / needed if needed else None,
            "stall_seconds": stall - before.decode.stall_seconds - before.prefill.stall_seconds
            if self._job["ours"]
            else None,
        }

    def _tokens(self, text: str, part: int, count: int) -> list[int]:
        """Tokens of one of the parts, each of `count` tokens, that a text is cut into."""
        tokens: list[int] = self._llm.get_tokenizer().encode(text, add_special_tokens=False)
        cut = tokens[part * count : (part + 1) * count]
        if len(cut) < count:
            raise ExpertierError(
                f"A text has only {len(tokens)} tokens, {(part + 1) * count} are needed.",
                "Give longer texts or ask for fewer requests.",
            )
        return cut

    def _stats(self) -> Stats:
        return summed(self._records())

    def _records(self) -> Sequence[Record]:
        """What the workers count; nothing in stock."""
        records: Sequence[Record] = self._llm.collective_rpc("expertier_stats") if self._job["ours"] else ()
        return records

    def _offload(self, tokens: int) -> dict[str, Any]:
        records = self._records()
        total, decode = summed(records), self._decode.decode
        return {
            "mode": "; ".join(record["mode"] for record in records),
            "budget_bytes": total.budget_bytes,
            "peak_resident_bytes": total.peak_resident_bytes,
            "total_bytes": total.total_bytes,
            "hit_ratio": decode.hit_ratio if decode.requests else None,
            "ready_hit_ratio": decode.ready_hit_ratio if decode.requests else None,
            "misses_per_token": decode.misses / tokens if tokens else 0.0,
            "stall_ms_per_token": 1e3 * decode.stall_seconds / tokens if tokens else 0.0,
            "read_bytes_per_token": self._decode.bytes_read / tokens if tokens else 0.0,
        }


def _add(total: Stats, now: Stats, before: Stats) -> None:
    """Add what was counted between two moments of a decode part."""
    total.bytes_read += now.bytes_read - before.bytes_read
    old: PhaseCounters = before.decode
    total.decode.ready_hits += now.decode.ready_hits - old.ready_hits
    total.decode.late += now.decode.late - old.late
    total.decode.misses += now.decode.misses - old.misses
    total.decode.stall_seconds += now.decode.stall_seconds - old.stall_seconds


def _processes() -> list[int]:
    own = psutil.Process()
    return [own.pid, *(child.pid for child in own.children(recursive=True))]


def _read_bytes() -> int:
    """Bytes that this process and those below it caused to be read from storage."""
    total = 0
    for process in _processes():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/io").read_text().splitlines():
                if line.startswith("read_bytes:"):
                    total += int(line.split()[1])
    return total


def _status_bytes(process: int, key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
