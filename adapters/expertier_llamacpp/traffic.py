"""The batch engine as a comparison of schedulers drives it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from expertier.comparison.traffic import Ask
from expertier.config import OffloadOptions
from expertier.telemetry import Stats
from expertier_llamacpp.batch import BatchEngine, Sampling
from expertier_llamacpp.batch.requests import FinishReason
from expertier_llamacpp.batch.sampling import make_sampler


class _Given:
    """A sampler that knows the answer; implements :class:`expertier_llamacpp.batch.sequence.Sampler`."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = iter(tokens)

    def sample(self, ctx: Any, idx: int) -> int:
        return next(self._tokens)


class _Counter:
    """A receiver that counts; implements :class:`expertier_llamacpp.batch.sequence.Receiver`."""

    paused = False

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens = 0
        self.over = False
        self.error: Exception | None = None

    def token(self, token: int) -> FinishReason | None:
        self.tokens += 1
        return None

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        self.over, self.error = True, error


class BatchTraffic:
    """Fulfils :class:`expertier.comparison.schedulers.TrafficServer`.

    Parameters
    ----------
    model : Path
        GGUF file.
    options : OffloadOptions
        Of Expertier.
    batch : int
        Requests that run at a time.
    context : int
        Most tokens of a request.
    step_tokens, threads : int
        As ``n_ubatch`` and ``n_threads``.
    """

    lingers = 0.0

    def __init__(
        self, model: Path, options: OffloadOptions, *, batch: int, context: int, step_tokens: int, threads: int
    ) -> None:
        given = {f"expert_{name}": value for name, value in options.changed().items()}
        self._engine = BatchEngine(
            str(model),
            max_sequences=batch,
            scheduling="greedy",  # routes are observed; the comparison exchanges who decides
            n_ctx=batch * context,
            n_batch=max(512, step_tokens),
            n_ubatch=step_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            **given,
        )
        self.admission = self._engine.admission
        self._running: dict[int, _Counter] = {}
        self._numbers: dict[Hashable, int] = {}

    def mode_line(self) -> str:
        return self._engine.llama.mode_line()

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self._engine.llama.tokenize(text.encode(), add_bos=False)
        return tokens

    def submit(self, number: int, ask: Ask) -> None:
        receiver = self._running[number] = _Counter(number)
        sampler = _Given(ask.given) if ask.given else make_sampler(self._engine.llama, Sampling(temperature=0))
        sequence = self._engine.submit_tokens(ask.prompt, sampler, receiver, max_tokens=ask.output)
        self._numbers[sequence.number] = number

    def number(self, name: Hashable) -> int:
        return self._numbers[name]

    def step(self) -> list[tuple[int, int, bool]]:
        self._engine.step()
        told = [(receiver.number, receiver.tokens, receiver.over) for receiver in self._running.values()]
        for receiver in [receiver for receiver in self._running.values() if receiver.over]:
            if receiver.error is not None:
                raise receiver.error
            del self._running[receiver.number]
        if not self._running:
            self._engine.forget()  # the next run finds no beginnings computed
        return told

    def stats(self) -> Stats:
        return self._engine.offload.stats()

    def close(self) -> None:
        self._engine.close()
