"""An engine of vLLM as a comparison of schedulers drives it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertier.comparison.traffic import Ask
from expertier.config import OffloadOptions
from expertier.scheduling import Admission
from expertier.telemetry import Stats
from expertier_vllm.metrics import summed
from expertier_vllm.offline import GIVEN_TOKENS, check_answered, greedy, open_engine, prepare_environment

_CACHE_BYTES = 512 << 20
_POLLED = 1.2  # upstream: SpinCondition of shm_broadcast.py; a worker that is asked nothing polls for one second


class VllmTraffic:
    """Fulfils :class:`expertier.comparison.schedulers.TrafficServer`.

    Parameters
    ----------
    model : Path
        Directory of the checkpoint.
    options : OffloadOptions
        Of Expertier.
    batch : int
        Requests that run at a time.
    context : int
        Most tokens of a request.
    step_tokens, threads : int
        Most tokens of a step; compute threads.
    """

    lingers = _POLLED

    def __init__(
        self, model: Path, options: OffloadOptions, *, batch: int, context: int, step_tokens: int, threads: int
    ) -> None:
        prepare_environment(threads)
        self._llm = open_engine(
            model,
            {**asdict(options), "scheduler": "greedy"},  # routes are sent; the comparison exchanges who decides
            context=context + 1,
            step_tokens=step_tokens,
            requests=batch,
            cache_bytes=_CACHE_BYTES,
            processors=(GIVEN_TOKENS,),
        )
        self._engine: Any = self._llm.llm_engine
        self.admission: Admission = self._engine.engine_core.engine_core.scheduler.admission

    def mode_line(self) -> str:
        return "; ".join(str(record["mode"]) for record in self._llm.collective_rpc("expertier_stats"))

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self._llm.get_tokenizer().encode(text, add_special_tokens=False)
        return tokens

    def submit(self, number: int, ask: Ask) -> None:
        from expertier_vllm.given import GIVEN

        parameters = greedy(ask.output)
        if ask.given:
            parameters.extra_args = {GIVEN: list(ask.given)}
        self._engine.add_request(str(number), {"prompt_token_ids": list(ask.prompt)}, parameters)

    def number(self, name: Hashable) -> int:
        return int(str(name).partition("-")[0])  # the engine appends something of its own

    def step(self) -> list[tuple[int, int, bool]]:
        told = []
        for output in self._engine.step():
            check_answered(output)
            answer = output.outputs[0]
            told.append((int(output.request_id), len(answer.token_ids), bool(output.finished)))
        return told

    def stats(self) -> Stats:
        return summed(self._llm.collective_rpc("expertier_stats"))

    def close(self) -> None:
        self._engine.engine_core.shutdown()
