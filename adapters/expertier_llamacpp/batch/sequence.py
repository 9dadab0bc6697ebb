"""A request in the engine: its tokens, who chooses the next one and who hears of it."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from expertier.errors import RequestCancelledError
from expertier_llamacpp.batch.requests import FinishReason, Output, TokenLogprobs
from expertier_llamacpp.batch.text import Pieces, TextStream

_numbers = itertools.count(1)
logger = logging.getLogger("expertier")


class Sampler(Protocol):
    """Chooses tokens: a ``LlamaSampler``, or what behaves like one."""

    def sample(self, ctx: Any, idx: int) -> int:
        """Choose from the logits in row `idx` of the last step, and remember the choice."""


class Receiver(Protocol):
    """Hears what becomes of a request, in the thread that runs the engine."""

    @property
    def paused(self) -> bool:
        """Whether no more tokens are wanted for now; the engine is woken when they are."""

    def token(self, token: int) -> FinishReason | None:
        """Take a token; a reason when the request is over with it."""

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        """Take note that the request is over; called once, and nothing is called afterwards."""


class ActiveSequence:
    """A request on its way through the engine.

    Parameters
    ----------
    tokens : sequence of int
        Its prompt.
    sampler : Sampler
        Chooses its tokens.
    receiver : Receiver
        Hears of them.
    most : int
        Most tokens of output.
    priority : int
        Smaller goes first among those that wait.
    exact : bool
        No stand-ins for absent experts in steps that compute it.

    Attributes
    ----------
    number : int
        Names it in the engine; never given twice.
    tokens : list of int
        Prompt and output so far.
    computed : int
        So many of them have their keys and values in the context.
    slot : int or None
        Its sequence of the context; ``None`` while it waits.
    behind : tuple of (ActiveSequence, int) or None
        Another one that is computing the same beginning, and how many tokens of it.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        sampler: Sampler,
        receiver: Receiver,
        *,
        most: int,
        priority: int = 0,
        exact: bool = False,
    ) -> None:
        self.number = next(_numbers)
        self.tokens = list(tokens)
        self.prompt_length = len(self.tokens)
        self.priority = priority
        self.exact = exact
        self.computed = 0
        self.slot: int | None = None
        self.behind: tuple[ActiveSequence, int] | None = None
        self.over = False
        self._sampler = sampler
        self._receiver = receiver
        self._most = most
        self._telling = threading.RLock()  # whoever is told of a token may end the request there and then

    @property
    def paused(self) -> bool:
        """Whether its receiver wants no token for now."""
        return self._receiver.paused

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed

    def advance(self, context: Any, row: int) -> None:
        """Choose the next token from the logits in `row` and hand it on."""
        token = self._sampler.sample(context, row)
        with self._telling:
            if self.over:
                return
            self.tokens.append(token)
            reason = self._receiver.token(token)
            if reason is None and len(self.tokens) - self.prompt_length >= self._most:
                reason = "length"
            if reason is not None and self._ends():
                self._receiver.end(reason, None)

    def finish(self, reason: FinishReason, error: Exception | None = None) -> bool:
        """End it before its time, from any thread; ``False`` when it was over already."""
        with self._telling:
            if not self._ends():
                return False
            self._receiver.end(reason, error)
            return True

    def _ends(self) -> bool:
        """Note that it is over; whether it was not before."""
        before, self.over = self.over, True
        return not before

    def fail(self, error: Exception) -> None:
        """End it with an error; whoever listens to it and raises harms nobody else."""
        try:
            self.finish("error", error)
        except Exception:
            logger.exception("The receiver of request %d failed.", self.number)


class TextReceiver:
    """Turns tokens into :class:`Output` objects.

    Parameters
    ----------
    index : int
        Which prompt of the call it is.
    prompt : sequence of int
        Its tokens.
    pieces : Pieces
        Bytes of tokens.
    stops : sequence of str
        Texts that end it.
    is_end : callable
        Whether a token ends the text.
    tell : callable
        Called with every output.
    stream : bool
        Whether outputs before the last one are wanted.
    logprobs : sequence of TokenLogprobs
        Of the tokens chosen so far; grows while the request runs.
    """

    paused = False

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        pieces: Pieces,
        stops: Sequence[str],
        *,
        is_end: Callable[[int], bool],
        tell: Callable[[Output], None],
        stream: bool,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        self._output = Output(index=index, piece="", text="", prompt_tokens=len(prompt))
        self._tokens = list(prompt)
        self._text = TextStream(pieces, stops)
        self._is_end = is_end
        self._tell = tell
        self._stream = stream
        self._logprobs = logprobs
        self._untold = ""  # text that belongs to the next output
        self._stopped = False

    def token(self, token: int) -> FinishReason | None:
        """Take a token; see :class:`Receiver`."""
        if self._is_end(token):
            return "stop"
        piece, self._stopped = self._text.add(token, self._tokens)
        self._tokens.append(token)
        self._untold += piece
        if self._stopped:
            return "stop"
        if self._stream and self._untold:
            piece, self._untold = self._untold, ""
            self._tell(replace(self._output, piece=piece, text=self._text.text))
        return None

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        """Tell the last output; see :class:`Receiver`."""
        piece = self._untold
        if not self._stopped:
            piece += self._text.end()
        if reason == "cancelled" and error is None:
            error = RequestCancelledError("The request was cancelled.")
        tokens = tuple(self._tokens[self._output.prompt_tokens :])
        self._tell(
            replace(
                self._output,
                piece=piece if self._stream else self._text.text,
                text=self._text.text,
                tokens=tokens,
                finish_reason=reason,
                error=error,
                logprobs=tuple(self._logprobs[: len(tokens)]),
            )
        )
