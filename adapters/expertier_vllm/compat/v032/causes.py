"""vLLM 0.32: the API server tells a client why its request failed."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import Any, Final

_FAILED: Final = "error"  # upstream: v1.engine.FINISH_REASON_STRINGS


def tell_causes() -> None:
    """Have requests that our scheduler ended answered with status 500 and the cause.

    Stock answers status 500 with "Internal server error" and nothing else, because no scheduler of its own knows more.
    Ours leaves the cause in the last output's ``stop_reason``.

    Upstream: ``AsyncLLM.generate``, from which every route gets its outputs, and ``GenerationError``, which every route
    turns into an answer, streamed or not. Calling it again does nothing.
    """
    from vllm.exceptions import GenerationError
    from vllm.v1.engine.async_llm import AsyncLLM

    stock = AsyncLLM.generate
    if hasattr(stock, "expertier"):
        return

    @functools.wraps(stock)
    async def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outputs = stock(self, *args, **kwargs)
        try:
            async for output in outputs:
                for answer in output.outputs:
                    if answer.finish_reason == _FAILED and isinstance(answer.stop_reason, str):
                        raise GenerationError(answer.stop_reason)
                yield output
        finally:
            await outputs.aclose()  # a client that left ends its request at once, as in stock

    generate.expertier = True  # type: ignore[attr-defined]
    AsyncLLM.generate = generate
