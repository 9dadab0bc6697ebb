"""Routes in vLLM's API server: ``GET /expertier/stats``, ``GET /expertier/metrics``, ``POST /expertier/budget``.

vLLM adds routes of plugins only when they are named: ``VLLM_PLUGINS=expertier``. That variable is one list of names for
all kinds of plugins, so other plugins have to be named in it as well; Expertier has the same name in every kind.

Upstream: ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``, and ``EngineClient.collective_rpc``, which calls a
method of that name on every worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from expertier.budget import parse_budget
from expertier.errors import BudgetError, ExpertierError, UnsupportedOptionError
from expertier.telemetry.metrics import CONTENT_TYPE, Record, expose
from expertier_vllm.compat import engine
from expertier_vllm.metrics import report
from expertier_vllm.options import VllmOptions

_STATS: Final = "expertier_stats"
_RESIZE: Final = "expertier_resize"
_UNDO: Final = "expertier_undo_resize"
_KEY_VARIABLE: Final = "VLLM_API_KEY"  # upstream: vllm.envs
_MOST_BODY_BYTES: Final = 4096

Handler = Callable[[Request], Awaitable[Response]]


class _RefusalError(Exception):
    """An answer other than success: HTTP status, and what is wrong."""

    def __init__(self, status: int, error: ExpertierError) -> None:
        super().__init__(str(error))
        self.status = status
        self.error = error


class EndpointPlugin:
    """Fulfils vLLM's protocol of the same name."""

    name = "expertier"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._options: VllmOptions | None = None
        self._keys: list[bytes] = []

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; vLLM calls this while it builds the application."""
        for path, method, handler in (
            ("/expertier/stats", "GET", self._get_stats),
            ("/expertier/metrics", "GET", self._get_metrics),
            ("/expertier/budget", "POST", self._post_budget),
        ):
            app.add_api_route(
                path, self._guarded(handler), methods=[method], tags=["Expertier"], response_model=None,
                name=f"expertier_{path.rpartition('/')[2]}",
            )  # fmt: skip

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine's client; vLLM calls this once the engine runs."""
        self._engine = engine_client
        if engine_client is not None:
            self._options = VllmOptions.from_additional_config(engine_client.vllm_config.additional_config)
        if self._options is not None:
            engine().tell_causes()  # one of several API servers: the configuration was built in another process
        # vLLM asks for its key below /v1 only; whoever set one does not mean these routes to be open.
        keys = getattr(args, "api_key", None) or [os.environ.get(_KEY_VARIABLE)]
        self._keys = [_digest(key) for key in keys if key]

    def _guarded(self, handler: Handler) -> Handler:
        async def route(request: Request) -> Response:
            try:
                self._check_key(request)
                if self._engine is None or self._options is None:
                    raise _RefusalError(
                        404,
                        UnsupportedOptionError(
                            "Expertier is not on in this server.",
                            """Start it with --additional-config '{"expertier": {"budget": "50%"}}'.""",
                        ),
                    )
                return await handler(request)
            except _RefusalError as refusal:
                return _failure(refusal.status, refusal.error)
            except ExpertierError as error:
                return _failure(400, error)
            except Exception as error:
                # The engine reports a failed call as text; whatever it is, the client is owed an answer it can parse.
                return _failure(500, ExpertierError(f"The workers did not answer: {error}"))

        return route

    def _check_key(self, request: Request) -> None:
        if not self._keys:
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = _digest(key)
        if scheme.lower() != "bearer" or not any([secrets.compare_digest(given, known) for known in self._keys]):
            raise _RefusalError(401, ExpertierError("The API key is missing or wrong."))

    async def _records(self) -> Sequence[Record]:
        records: Sequence[Record] = await self._engine.collective_rpc(_STATS)
        return records

    async def _get_stats(self, request: Request) -> Response:
        return JSONResponse(report(await self._records()))

    async def _get_metrics(self, request: Request) -> Response:
        return Response(expose(await self._records()), headers={"Content-Type": CONTENT_TYPE})

    async def _post_budget(self, request: Request) -> Response:
        assert self._options is not None
        if not self._options.budget_endpoint:
            raise _RefusalError(
                403,
                UnsupportedOptionError(
                    "Changing the budget over HTTP is off.",
                    """Turn it on at start: --additional-config '{"expertier": {"budget_endpoint": true, ...}}'.""",
                ),
            )
        budget = _read_budget(await _read_body(request))
        for answer in await self._engine.collective_rpc(_RESIZE, args=(budget,)):
            error = answer.get("error") if isinstance(answer, Mapping) else None
            if error:
                await self._engine.collective_rpc(_UNDO)  # stages of a pipeline may have room for different budgets
                raise BudgetError(str(error.get("problem", error)), str(error.get("remedy", "")))
        return JSONResponse(report(await self._records()))


async def _read_body(request: Request) -> Any:
    body = await request.body()
    try:
        if len(body) > _MOST_BODY_BYTES:
            raise ValueError
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnsupportedOptionError(
            "The body of the request is not JSON.", """Send e.g. {"budget": "8GiB"}."""
        ) from error


def _read_budget(body: Any) -> str | int:
    if not isinstance(body, dict) or set(body) != {"budget"}:
        raise UnsupportedOptionError(
            "The body of the request is not an object with the one key 'budget'.",
            """Send e.g. {"budget": "8GiB"}.""",
        )
    budget = body["budget"]
    parse_budget(budget, 1 << 60)  # a slip of the pen need not reach the workers
    assert isinstance(budget, str | int)
    return budget


def _failure(status: int, error: ExpertierError) -> JSONResponse:
    return JSONResponse(error.as_body(), status_code=status)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
