"""The server's completions over a batch engine: many clients at once, answers and errors as the stock server's.

The stock routes hold one lock from a request's first token to its last. These two stand in their place; requests,
answers, chat formats and error bodies are still llama-cpp-python's own.

Upstream symbols that are touched, all in ``llama_cpp.server``: ``app.prepare_request_resources`` turns a body into
arguments, ``app.authenticate`` checks keys, ``app._ping_message_factory`` is the setting of its event streams, and
``errors.RouteErrorHandler`` is the route class.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

import anyio
import llama_cpp
from fastapi import APIRouter, Depends, Request
from llama_cpp.server import app as stock_app
from llama_cpp.server.errors import RouteErrorHandler
from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from sse_starlette.sse import EventSourceResponse

from expertier.errors import RequestCancelledError, RequestError
from expertier_llamacpp.batch.engine import BatchEngine
from expertier_llamacpp.batch.view import RequestView

_END: Final = object()
_MOST_CHOICES: Final = 128
_THREADS: Final = 1024  # a thread per request that is being answered, most of them asleep

Call = Callable[[], Any]
"""Begins an answer: a dictionary, or an iterator of chunks when it is streamed."""


class _ErrorHandler(RouteErrorHandler):
    """The stock error bodies, with a client's mistakes told as such."""

    def error_message_wrapper(self, error: Exception, body: Any = None) -> Any:
        known = any(pattern.search(str(error)) for pattern in self.pattern_and_formatters)
        if isinstance(error, RequestError) and not known:
            return 400, _error_body(error)
        if isinstance(error, RequestCancelledError):
            return 499, _error_body(error)  # nobody reads it; the number is what other servers log
        return super().error_message_wrapper(error, body)


def _error_body(error: Exception) -> dict[str, Any]:
    kind = "invalid_request_error" if isinstance(error, (RequestError, ValueError)) else "internal_server_error"
    return {"message": str(error), "type": kind, "param": None, "code": None}


def batch_router(engine: BatchEngine) -> APIRouter:
    """Routes that answer from an engine whose steps somebody runs.

    Parameters
    ----------
    engine : BatchEngine
        Started.
    """
    router = APIRouter(route_class=_ErrorHandler, dependencies=[Depends(stock_app.authenticate)], tags=["OpenAI V1"])
    seeds = random.Random(None if _draws_seeds(engine) else engine.llama._seed)

    @router.post("/v1/completions", response_model=llama_cpp.CreateCompletionResponse)
    @router.post("/v1/engines/copilot-codex/completions", include_in_schema=False)
    async def create_completion(request: Request, body: CreateCompletionRequest) -> Any:
        prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        exclude = {"n", "best_of", "logit_bias_type", "user", "min_tokens"}
        arguments = [{**body.model_dump(exclude=exclude), "prompt": prompt} for prompt in prompts or [""]]
        return await _answer(request, engine, body, arguments, body.n, RequestView.create_completion, seeds)

    @router.post("/v1/chat/completions", response_model=llama_cpp.ChatCompletion)
    async def create_chat_completion(request: Request, body: CreateChatCompletionRequest) -> Any:
        arguments = [body.model_dump(exclude={"n", "logit_bias_type", "user", "min_tokens"})]
        return await _answer(request, engine, body, arguments, body.n, RequestView.create_chat_completion, seeds)

    return router


def _draws_seeds(engine: BatchEngine) -> bool:
    return bool(engine.llama._seed == llama_cpp.LLAMA_DEFAULT_SEED)


async def _answer(
    request: Request,
    engine: BatchEngine,
    body: Any,
    arguments: list[dict[str, Any]],
    count: int | None,
    method: Callable[..., Any],
    seeds: random.Random,
) -> Any:
    """Answer `count` times to every prompt, all at once."""
    count = count or 1
    if not 1 <= count * len(arguments) <= _MOST_CHOICES:
        raise RequestError(f"n={count} for {len(arguments)} prompts is not possible.", f"Ask for 1 to {_MOST_CHOICES}.")
    _allow_threads()
    views, calls = [], []
    for given in arguments:
        for choice in range(count):
            own = dict(given)
            view = RequestView(engine, seeds.getrandbits(32))
            stock_app.prepare_request_resources(body, lambda _name, view=view: view, body.model, own)  # type: ignore[arg-type]
            if own.get("seed") is not None:
                own["seed"] += choice
            views.append(view)
            calls.append(functools.partial(method, view, **own))
    if body.stream:
        ping: Any = stock_app._ping_message_factory
        heads = await _all(request, views, [functools.partial(_begin, call) for call in calls])
        return EventSourceResponse(_events(views, heads), sep="\n", ping_message_factory=ping)
    return _merge(await _all(request, views, calls), count)


def _allow_threads() -> None:
    limiter = anyio.to_thread.current_default_thread_limiter()
    limiter.total_tokens = max(limiter.total_tokens, _THREADS)


async def _all(request: Request, views: list[RequestView], calls: Sequence[Call]) -> list[Any]:
    """Run the calls side by side, and give them up when the client goes away."""
    gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(request))
    work: asyncio.Future[Any] = asyncio.gather(*(_in_thread(call) for call in calls))
    try:
        await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            _abandon(views)
        return list(await work)
    except BaseException:
        _abandon(views)
        raise
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _abandon(views: list[RequestView]) -> None:
    for view in views:
        view.abandon()


async def _in_thread(call: Call) -> Any:
    # Whoever gives up need not wait for the thread: its request is abandoned, and it ends.
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


def _begin(call: Call) -> tuple[Any, Iterator[Any]]:
    """Begin a stream and wait for its first chunk: what is refused is refused before the answer has a status."""
    chunks = iter(call())
    return next(chunks, _END), chunks


async def _events(views: list[RequestView], heads: list[tuple[Any, Iterator[Any]]]) -> AsyncIterator[dict[str, str]]:
    """Chunks of all choices as they come."""
    arrived: asyncio.Queue[dict[str, str] | None] = asyncio.Queue(maxsize=16)

    async def read(index: int, chunk: Any, chunks: Iterator[Any]) -> None:
        try:
            while chunk is not _END:
                for choice in chunk["choices"]:
                    choice["index"] = index
                await arrived.put({"data": json.dumps(chunk)})
                chunk = await _in_thread(functools.partial(next, chunks, _END))
        except Exception as error:  # the status is sent already: the client finds it in the stream
            await arrived.put({"data": json.dumps({"error": _error_body(error)})})
        await arrived.put(None)

    readers = [asyncio.ensure_future(read(index, *head)) for index, head in enumerate(heads)]
    try:
        left = len(readers)
        while left:
            event = await arrived.get()
            if event is None:
                left -= 1
            else:
                yield event
        yield {"data": "[DONE]"}
    finally:
        _abandon(views)
        for reader in readers:
            reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*readers, return_exceptions=True)


def _merge(answers: list[dict[str, Any]], per_prompt: int) -> dict[str, Any]:
    """One answer with the choices of all."""
    merged = answers[0]
    for index, answer in enumerate(answers[1:], 1):
        choice = answer["choices"][0]
        choice["index"] = index
        merged["choices"].append(choice)
        usage, more = merged["usage"], answer["usage"]
        usage["completion_tokens"] += more["completion_tokens"]
        usage["prompt_tokens"] += more["prompt_tokens"] if index % per_prompt == 0 else 0
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return merged
