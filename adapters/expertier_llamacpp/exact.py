"""A single request may ask for the exact model where the others have stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import llama_cpp

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from expertier.virtual import VirtualExperts

_asked: ContextVar[bool] = ContextVar("whether the HTTP request that is served asked for exactness", default=False)

KEY: Final = "expertier"
"""Key of our part in the body of a request: ``{"expertier": {"exact": true}}``."""


def asked_for_exactness() -> bool:
    """Whether the HTTP request that is being answered asked for it."""
    return _asked.get()


class ExactRequests(llama_cpp.Llama):
    """The stock methods with one more argument: ``expert_exact=True`` computes the answer without stand-ins."""

    virtual: VirtualExperts | None

    def create_completion(self, *args: Any, expert_exact: bool = False, **kwargs: Any) -> Any:
        """As the stock method; with `expert_exact` the answer is the stock engine's."""
        return self._answer(super().create_completion, expert_exact, args, kwargs)

    def __call__(self, *args: Any, expert_exact: bool = False, **kwargs: Any) -> Any:
        """As the stock method; with `expert_exact` the answer is the stock engine's."""
        return self._answer(super().__call__, expert_exact, args, kwargs)

    def create_chat_completion(self, *args: Any, expert_exact: bool = False, **kwargs: Any) -> Any:
        """As the stock method; with `expert_exact` the answer is the stock engine's."""
        return self._answer(super().create_chat_completion, expert_exact, args, kwargs)

    def eval(self, tokens: Sequence[int]) -> None:
        """As the stock method. A prompt is computed without stand-ins, also where its last batch is one token."""
        if self.virtual is None or self.virtual.settings.prefill or len(tokens) <= 1:
            super().eval(tokens)
            return
        with self.virtual.exactly():
            super().eval(tokens)

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """As the stock method. Nobody knows how the tokens in it were computed, so no exact answer begins with them."""
        super().load_state(state)
        if self.virtual is not None:
            self.virtual.stood_in = True

    def _answer(self, stock: Callable[..., Any], exact: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.virtual is None or not (exact or _asked.get()):
            return stock(*args, **kwargs)
        with self._exactly(first=True):
            answer = stock(*args, **kwargs)
        return self._pieces(answer) if isinstance(answer, Iterator) else answer

    def _pieces(self, answer: Iterator[Any]) -> Iterator[Any]:
        first = True
        while True:
            with self._exactly(first=first):
                try:
                    piece = next(answer)
                except StopIteration:
                    return
            first = False
            yield piece

    @contextmanager
    def _exactly(self, *, first: bool) -> Iterator[None]:
        """Compute without stand-ins, and start from nothing that was computed with them."""
        virtual = self.virtual
        assert virtual is not None
        cache, self.cache = self.cache, None  # states of other answers
        if first and virtual.stood_in:
            self.reset()  # type: ignore[no-untyped-call] # the context may hold tokens of such an answer
            virtual.stood_in = False
        try:
            with virtual.exactly():
                yield
        finally:
            self.cache = cache


class ExactnessMiddleware:
    """Notes for the handlers of a request whether its body asks for exactness; the stock models drop such fields.

    Parameters
    ----------
    app : ASGI application
        What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
        waiting = iter(messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        try:
            exact = wants_exactness(b"".join(message.get("body", b"") for message in messages))
        except ValueError as error:
            await _refuse(send, str(error))
            return
        token = _asked.set(exact)
        try:
            await self._app(scope, replay, send)
        finally:
            _asked.reset(token)


def wants_exactness(body: bytes) -> bool:
    """Whether the body of a request asks for the exact model.

    Raises
    ------
    ValueError
        When it has a part for us that is not understood; whatever else is wrong with a body is for others to say.
    """
    if f'"{KEY}"'.encode() not in body:
        return False
    try:
        given = json.loads(body)
    except ValueError:
        return False
    own = given.get(KEY) if isinstance(given, dict) else None
    if own is None:
        return False
    if not isinstance(own, dict) or set(own) - {"exact"} or not isinstance(own.get("exact", False), bool):
        raise ValueError(f'"{KEY}" is {own!r:.80}; it can be {{"exact": true}} or {{"exact": false}}.')
    return bool(own.get("exact", False))


async def _refuse(send: Send, reason: str) -> None:
    error = {"message": reason, "type": "invalid_request_error", "param": KEY, "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
