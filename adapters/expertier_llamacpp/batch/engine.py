"""The batch engine: sequences join and leave, prompts and output share the steps."""

from __future__ import annotations

import logging
import operator
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

import llama_cpp

from expertier.errors import ManagerClosedError, RequestError, RequestTooLongError, UnsupportedOptionError
from expertier.scheduling import CONTROL, Admission, Fairness, PathBook, make_batcher
from expertier_llamacpp.batch.loop import StepLoop
from expertier_llamacpp.batch.progress import Bar, progress_bar
from expertier_llamacpp.batch.requests import Output, Request, Sampling, TokenLogprobs
from expertier_llamacpp.batch.sampling import Watched, make_sampler
from expertier_llamacpp.batch.sequence import ActiveSequence, Receiver, Sampler, TextReceiver
from expertier_llamacpp.batch.telemetry import EngineStats
from expertier_llamacpp.batch.text import Pieces
from expertier_llamacpp.llama import Llama

_AHEAD = 64  # prompts taken from the caller beyond those that run, for the scheduler to choose from

logger = logging.getLogger("expertier")


class BatchEngine:
    """Decodes many prompts together in one llama.cpp context, with the experts on storage.

    Parameters
    ----------
    model_path : str
        As for :class:`expertier_llamacpp.Llama`.
    max_sequences : int, default 8
        Sequences that run at a time; others wait.
    scheduling : str, default "fcfs"
        Who of those that wait joins next, a key of :data:`expertier.scheduling.BATCHERS`.
    fairness : Fairness, optional
        How far a request may fall behind the order of arrival for the others' sake.
    n_ctx : int, default 512
        KV memory in tokens. All running sequences share it, and cells of a common beginning are used once. A request
        may be as long as all of it.
    **kwargs
        Everything :class:`expertier_llamacpp.Llama` takes: ``expert_budget``, ``n_batch``, ``n_threads`` and so on.

    Attributes
    ----------
    llama : Llama
        The model; its own ``generate`` and ``eval`` must not be used beside the engine.
    offload : OffloadManager
        The same as ``llama.offload``.
    admission : Admission
        Decides who joins; its ``stats`` tell who overtook whom.

    Raises
    ------
    ExpertierError
        A subclass with the reason and the way out.

    Notes
    -----
    A step takes the next token of every running sequence and fills up with prompt tokens, to at most `n_ubatch` tokens
    while anybody decodes. When the experts of a step do not fit the budget, or its tokens not the KV memory, the step
    is made smaller: nobody fails for it unless not even one token can be computed.

    A sequence that runs alone gets the same bits as from :class:`expertier_llamacpp.Llama`; in company it gets those of
    stock llama.cpp decoding the same batches. Random numbers belong to a request and do not depend on its company.

    All methods may be called from any thread. Steps run in whatever thread iterates over :meth:`generate` or calls
    :meth:`step`, or in one of the engine's own after :meth:`start`.

    Examples
    --------
    >>> from expertier_llamacpp import BatchEngine
    >>> engine = BatchEngine("qwen3-30b-a3b-q4_k_m.gguf", expert_budget="8GiB", max_sequences=8, n_ctx=8192)
    >>> for output in engine.generate(["The capital of France is", "Water boils at"], max_tokens=16):
    ...     print(output.index, output.text)
    """

    def __init__(
        self,
        model_path: str,
        *,
        max_sequences: int = 8,
        scheduling: str = "fcfs",
        fairness: Fairness | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("embedding", "draft_model"):
            if kwargs.get(name):
                raise UnsupportedOptionError(
                    f"{name} needs a context for itself.", "Use expertier_llamacpp.Llama for it."
                )
        make_batcher(scheduling)  # a slip of the pen is told before any work
        self._set_up(Llama(model_path, max_sequences=max_sequences, **kwargs), scheduling, fairness, owned=True)

    @classmethod
    def over(cls, llama: Llama, *, scheduling: str = "fcfs", fairness: Fairness | None = None) -> BatchEngine:
        """Run on a model that was loaded with ``max_sequences``; it stays open when the engine is closed."""
        engine = cls.__new__(cls)
        engine._set_up(llama, scheduling, fairness, owned=False)
        return engine

    def _set_up(self, llama: Llama, scheduling: str, fairness: Fairness | None, *, owned: bool) -> None:
        layers = llama.catalog.layers
        book = None if scheduling == CONTROL else PathBook(len(layers), max(layer.experts for layer in layers))
        admission = Admission(make_batcher(scheduling), book, fairness=fairness or Fairness.from_options({}))
        self.llama = llama
        self.offload = llama.offload
        self._owned = owned
        self.admission = admission
        self._loop = StepLoop(llama, admission)
        self.n_ctx = self._loop.n_ctx
        self.max_sequences = self._loop.max_sequences
        self.pieces = Pieces(llama)
        self._stepping = threading.RLock()
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._awake = False  # whether there may be something to compute
        self._closed = False
        self._computing = False  # a step runs, in the thread that holds `_stepping`

    # ---- requests

    def generate(
        self,
        prompts: Iterable[str | Sequence[int] | Request],
        *,
        stream: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> Iterator[Output]:
        """Complete many prompts.

        Parameters
        ----------
        prompts : iterable of str, sequence of int or Request
            Read as they are needed, so it may be endless.
        stream : bool
            Whether text is told as it comes; otherwise one output per prompt when it is finished.
        progress : bool
            Whether to draw a progress bar on standard error.
        **options
            Fields of :class:`Request` and :class:`Sampling` for all prompts that are no requests themselves.

        Yields
        ------
        Output
            As they come; ``index`` tells the prompt. A prompt that cannot be served ends with ``finish_reason`` "error"
            and the error in its output, and harms no other.

        Raises
        ------
        RequestError
            For an option that does not exist.
        """
        if isinstance(prompts, str):
            raise RequestError("generate() takes many prompts, this is one text.", "Put it into a list.")
        template = _request(options)
        bar = progress_bar(len(prompts) if isinstance(prompts, Sized) else None, shown=progress)
        return self._generate(iter(prompts), template, bar, stream=stream)

    def _generate(
        self,
        prompts: Iterator[str | Sequence[int] | Request],
        template: Request,
        shown: AbstractContextManager[Bar],
        *,
        stream: bool,
    ) -> Iterator[Output]:
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        pending: dict[int, ActiveSequence] = {}
        numbered = enumerate(prompts)
        more = True

        def refill() -> bool:
            """Take prompts from the caller; whether there may be more."""
            while len(pending) < self.max_sequences + _AHEAD:
                index, prompt = next(numbered, (-1, ""))
                if index < 0:
                    return False
                try:
                    request = prompt if isinstance(prompt, Request) else replace(template, prompt=prompt)
                    pending[index] = self._submit_text(request, index, outputs.put, stream=stream)
                except RequestError as error:
                    outputs.put(Output(index=index, piece="", text="", finish_reason="error", error=error))
            return True

        with shown as bar:
            try:
                while more or pending or not outputs.empty():
                    more = more and refill()
                    if pending and outputs.empty() and self._thread is None:
                        self.step()
                    while pending or not outputs.empty():
                        try:
                            output = outputs.get(block=self._thread is not None and bool(pending))
                        except queue.Empty:
                            break
                        if output.finish_reason is not None:
                            pending.pop(output.index, None)
                        bar.note(output)
                        yield output
                        if more and len(pending) < self.max_sequences:
                            break
            finally:
                for sequence in pending.values():
                    self.cancel(sequence.number)

    def submit(self, request: Request, tell: Callable[[Output], None], *, stream: bool = True) -> int:
        """Queue a request and return its number at once.

        Parameters
        ----------
        request : Request
            What is asked.
        tell : callable
            Called with every :class:`Output`, in the thread that runs the steps; it must be quick and not raise.
        stream : bool
            Whether it is told outputs before the last.

        Raises
        ------
        RequestError
            When it cannot be served: empty, longer than the context, or with an option that is not possible.
        """
        return self._submit_text(request, 0, tell, stream=stream).number

    def _submit_text(
        self, request: Request, index: int, tell: Callable[[Output], None], *, stream: bool
    ) -> ActiveSequence:
        self._check_open()  # the vocabulary goes with the model
        tokens = self._tokens_of(request.prompt)
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestError(f"max_tokens={request.max_tokens} is not possible.", "Give at least 1, or None.")
        vocabulary = self.llama._model.vocab
        sampler: Sampler = make_sampler(self.llama, request.sampling)
        logprobs: list[TokenLogprobs] = []
        if request.logprobs is not None:
            sampler = watched = Watched(sampler, self.llama.n_vocab(), request.logprobs)
            logprobs = watched.seen
        receiver = TextReceiver(
            index,
            tokens,
            self.pieces,
            [request.stop] if isinstance(request.stop, str) else [stop for stop in request.stop if stop],
            is_end=lambda token: bool(llama_cpp.llama_vocab_is_eog(vocabulary, token)),
            tell=tell,
            stream=stream,
            logprobs=logprobs,
        )
        return self.submit_tokens(
            tokens,
            sampler,
            receiver,
            max_tokens=request.max_tokens,
            priority=request.priority,
            exact=request.exact,
        )

    def submit_tokens(
        self,
        tokens: Sequence[int],
        sampler: Sampler,
        receiver: Receiver,
        *,
        max_tokens: int | None = None,
        priority: int = 0,
        exact: bool = False,
    ) -> ActiveSequence:
        """Queue a prompt in tokens with a sampler and a receiver of one's own; see :meth:`submit`."""
        if not tokens:
            raise RequestError("The prompt is empty.", "Give at least one token.")
        left = self.n_ctx - len(tokens)
        if left <= 0:
            # The server of llama_cpp knows these words and makes of them what OpenAI's clients expect.
            raise RequestTooLongError(
                f"Requested tokens ({len(tokens)}) exceed context window of {self.n_ctx}",
                "Shorten the prompt or load the model with a larger n_ctx.",
            )
        wrong = [token for token in tokens if not 0 <= token < self.llama.n_vocab()]
        if wrong:
            raise RequestError(f"Token {wrong[0]} is not one of the {self.llama.n_vocab()} of the model.")
        most = left if max_tokens is None else min(max_tokens, left)
        sequence = ActiveSequence(tokens, sampler, receiver, most=most, priority=priority, exact=exact)
        with self._work:
            self._check_open()
            self._loop.add(sequence)
            self._awake = True
            self._work.notify_all()
        return sequence

    def cancel(self, number: int) -> bool:
        """End a request, running or waiting; ``False`` when it is over or unknown. Its output says "cancelled"."""
        for sequence in self._loop.everybody():
            if sequence.number == number:
                return sequence.finish("cancelled")
        return False

    def _tokens_of(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            if isinstance(prompt, (bytes, bytearray)):
                raise RequestError("The prompt is bytes: neither text nor tokens.", "Decode it.")
            try:
                return [operator.index(token) for token in prompt]
            except TypeError as error:
                raise RequestError(f"The prompt is no text and no tokens: {error}.") from error
        if not prompt:
            raise RequestError("The prompt is empty.", "Give at least one character.")
        begins = bool(self.llama._model.add_bos_token())
        try:
            text = prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"The prompt is not text: {error}.", "Leave lone surrogates out.") from error
        tokens: list[int] = self.llama.tokenize(text, add_bos=begins, special=True)
        return tokens

    # ---- life cycle

    def start(self) -> None:
        """Run the steps in a thread of the engine's own until it is closed."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="expertier-batch", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Tell the engine's thread that a paused request wants tokens again."""
        with self._work:
            self._awake = True
            self._work.notify_all()

    def _serve(self) -> None:
        while True:
            with self._work:
                while not self._closed and not self._awake:
                    self._work.wait()
                if self._closed:
                    return
                self._awake = False
            try:
                while self.step():
                    pass
            except Exception as error:
                for sequence in self._loop.everybody():
                    sequence.fail(error)
                if isinstance(error, ManagerClosedError):
                    return
                logger.exception("A step of the batch engine failed.")

    def close(self) -> None:
        """End all requests, and free the model unless it was lent. Closing twice does nothing.

        Called by somebody who is told an output, it comes to pass when the step that tells it is over.
        """
        with self._work:
            self._closed = True
            self._work.notify_all()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._stepping:
            if not self._computing:
                self._shut()

    def _shut(self) -> None:
        error = ManagerClosedError("The engine was closed.", "Load the model again.")
        for sequence in self._loop.everybody():
            sequence.fail(error)
        self._loop.clear()
        if self._owned:
            self.llama.close()

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def forget(self) -> None:
        """Forget the beginnings of prompts that finished requests left in the KV memory."""
        with self._stepping:
            self._check_open()
            self._loop.forget()

    def stats(self) -> EngineStats:
        """Return a snapshot of the engine's counters."""
        return self._loop.stats()

    def step(self) -> bool:
        """Let requests join and leave, and compute one step; whether there was anything to compute."""
        with self._stepping:
            self._check_open()
            self._computing = True
            try:
                return self._loop.step()
            finally:
                self._computing = False
                if self._closed:
                    self._shut()

    def _check_open(self) -> None:
        if self._closed or self.llama._ctx.ctx is None:  # whoever lent the model may have closed that
            raise ManagerClosedError("The engine is closed.", "Load the model again.")


_SAMPLING = frozenset(item.name for item in fields(Sampling))
_REQUEST = frozenset(item.name for item in fields(Request)) - {"prompt", "sampling"}


def _request(options: dict[str, Any]) -> Request:
    """Make a request without a prompt of keyword arguments."""
    unknown = sorted(set(options) - _SAMPLING - _REQUEST - {"sampling"})
    if unknown:
        raise RequestError(
            f"There is no option {unknown[0]!r}.", f"Options are: {', '.join(sorted(_SAMPLING | _REQUEST))}."
        )
    sampling = options.get("sampling") or Sampling()
    sampling = replace(sampling, **{name: value for name, value in options.items() if name in _SAMPLING})
    own = {name: value for name, value in options.items() if name in _REQUEST}
    return Request(prompt="", sampling=sampling, **own)
