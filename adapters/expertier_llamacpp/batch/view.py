"""One request's view of a batch engine as a ``llama_cpp.Llama``: chat formats, stop texts and answers stay upstream's.

``llama_cpp.Llama`` makes everything it answers of the tokens that its method ``generate`` yields. Here they come from
the engine, so that many requests are computed together while upstream's code treats each as if it were alone.

Upstream symbols that are touched: ``Llama.generate`` and ``Llama.detokenize`` are overridden, ``Llama._init_sampler``
makes the chain of samplers (grammars and logits processors included), and ``_input_ids`` and ``_scores`` are what
``Llama._create_completion`` and logits processors read of a running request.
"""

from __future__ import annotations

import queue
from collections.abc import Generator, Sequence
from typing import Any, NoReturn

import numpy as np
from llama_cpp import llama_cpp as C  # noqa: N812 - the name llama-cpp-python itself uses for its C interface

from expertier.errors import ContextFullError, RequestCancelledError, RequestError, UnsupportedOptionError
from expertier_llamacpp.batch.engine import BatchEngine
from expertier_llamacpp.batch.requests import FinishReason
from expertier_llamacpp.batch.sequence import ActiveSequence
from expertier_llamacpp.exact import asked_for_exactness
from expertier_llamacpp.guards import GuardedRequests

_UNREAD = 64  # tokens computed ahead of whoever reads them
_FIRST_ROWS = 16  # of logits, for which there is memory at first


class RequestView(GuardedRequests):
    """A ``llama_cpp.Llama`` for one request at a time, with the engine behind it.

    Parameters
    ----------
    engine : BatchEngine
        Computes; somebody must run its steps (:meth:`BatchEngine.start`).
    seed : int
        For requests that name none.
    """

    def __init__(self, engine: BatchEngine, seed: int) -> None:
        self.__dict__.update(engine.llama.__dict__)
        self._engine = engine
        self._exact = asked_for_exactness()
        self._seed = seed
        self._sampler: Any = None
        self.cache = None
        self.verbose = False  # timings would be those of everybody
        self._logits_all = True  # whatever was asked at loading: rows that are wanted are there
        self.input_ids = np.zeros(0, np.intc)
        self.n_tokens = 0
        self._keep_scores = False
        self._kept = np.zeros((0, 0), np.single)
        self._missing = 0
        self._most = 0
        self._sequences: list[ActiveSequence] = []
        self._gone = False

    def _create_completion(self, prompt: Any, *arguments: Any, **options: Any) -> Any:
        self._most = options.get("max_tokens") or 0
        self._keep_scores = options.get("logprobs") is not None
        if self._keep_scores and options.get("echo"):
            raise RequestError(
                "logprobs of the prompt (echo) are not computed for several sequences.", "Leave echo out."
            )
        return super()._create_completion(prompt, *arguments, **options)

    def generate(self, tokens: Sequence[int], **options: Any) -> Generator[int, Sequence[int] | None, None]:  # type: ignore[override]
        """Yield tokens as ``llama_cpp.Llama.generate`` does."""
        if options.pop("stopping_criteria", None) is not None:
            raise RequestError("stopping_criteria is not possible with several sequences.", "Use stop texts.")
        options.pop("reset", None)
        prompt = list(tokens)
        self._sampler = self._init_sampler(**options)
        self.n_tokens = len(prompt)
        self.input_ids = np.zeros(self._engine.n_ctx + 1, np.intc)
        self.input_ids[: self.n_tokens] = prompt
        self._kept = np.zeros((_FIRST_ROWS, self._n_vocab if self._keep_scores else 0), np.single)
        self._missing = self.n_tokens - 1
        inbox = _Inbox(self._most if self._most > 0 else self._engine.n_ctx, self)
        sequence = self._engine.submit_tokens(prompt, self, inbox, exact=self._exact)
        self._sequences.append(sequence)
        try:
            if self._gone:
                sequence.finish("cancelled")
            while True:
                yield inbox.get(self._engine)
        finally:
            if sequence.finish("cancelled"):
                self._engine.wake()  # its place is free

    def abandon(self) -> None:
        """Give the request up, from any thread: whoever waits for its tokens gets a ``RequestCancelledError``."""
        self._gone = True
        for sequence in self._sequences:
            sequence.finish("cancelled")
        self._engine.wake()

    # ---- the engine's side

    def sample(self, ctx: Any, idx: int, **_options: Any) -> int:  # type: ignore[override]
        """Choose a token; see :class:`expertier_llamacpp.batch.sequence.Sampler`."""
        if self._keep_scores:
            row = self.n_tokens - 1 - self._missing
            if row == len(self._kept):
                self._kept = np.concatenate([self._kept, np.zeros_like(self._kept)])
            self._kept[row] = np.ctypeslib.as_array(C.llama_get_logits_ith(ctx.ctx, idx), (self._n_vocab,))
        token: int = self._sampler.sample(ctx, idx)
        return token

    def note(self, token: int) -> None:
        """A token was chosen: logits processors see it from now on."""
        self.input_ids[self.n_tokens] = token
        self.n_tokens += 1

    @property
    def _scores(self) -> Any:
        """Logits by the place of their token: of the output alone, because upstream works with copies of all."""
        count = self.n_tokens - self._missing  # before the rows, which the engine's thread may exchange for more
        found = self._kept[:count].view(_OutputRows)
        found.missing = self._missing
        return found

    # ---- what a view of a shared context is not

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Bytes of tokens; upstream asks for all of a request's again after every token."""
        if special or self._engine.pieces.foreign:
            return super().detokenize(tokens, prev_tokens, special)
        return self._engine.pieces.join(tokens)

    def close(self) -> None:
        """Nothing: the model belongs to the engine."""

    def __del__(self) -> None:
        pass

    def _refuse(self, *_arguments: Any, **_options: Any) -> NoReturn:
        raise UnsupportedOptionError(
            "This needs the context for itself, but several sequences share it.",
            "Load the model without max_sequences.",
        )

    eval = embed = create_embedding = save_state = load_state = reset = _refuse


class _OutputRows(np.ndarray):
    """Logits of a request's output, and what is worked out of them, under the numbers they have behind a prompt's.

    Attributes
    ----------
    missing : int
        Rows of the prompt, which are not there.
    """

    missing = 0

    def __array_finalize__(self, source: Any) -> None:
        self.missing = getattr(source, "missing", 0)

    def __getitem__(self, key: Any) -> Any:
        """Row ``[place, :]``, or the rows ``[place:]``; upstream asks for no others."""
        rows = self.view(np.ndarray)
        if isinstance(key, slice):
            return rows[max(0, (key.start or 0) - self.missing) :]
        if isinstance(key, tuple) and key[0] >= 0:
            return rows[(key[0] - self.missing, *key[1:])]
        return rows[key]


class _Inbox:
    """Tokens on their way from the engine to the thread that writes the answer."""

    def __init__(self, most: int, view: RequestView) -> None:
        self._items: queue.SimpleQueue[int | tuple[FinishReason, Exception | None]] = queue.SimpleQueue()
        self._most = most
        self._view = view
        self._written = self._read = 0

    @property
    def paused(self) -> bool:
        """Whether no more tokens are wanted for now.

        Upstream ends an answer itself, and may want more than `max_tokens` tokens to end it with a whole character.
        """
        return self._written >= self._most or self._written - self._read >= _UNREAD

    def token(self, token: int) -> FinishReason | None:
        self._view.note(token)
        self._written += 1
        self._items.put(token)
        return None

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        self._items.put((reason, error))

    def get(self, engine: BatchEngine) -> int:
        was_paused = self.paused
        self._most = max(self._most, self._read + 1)
        if was_paused and not self.paused:
            engine.wake()
        item = self._items.get()
        if isinstance(item, int):
            self._read += 1
            return item
        reason, error = item
        if error is not None:
            raise error
        if reason == "cancelled":
            raise RequestCancelledError("The request was cancelled.")
        raise ContextFullError(
            "The context is full in the middle of a character.", "Load the model with a larger n_ctx."
        )
