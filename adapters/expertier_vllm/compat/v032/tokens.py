"""vLLM 0.32: which tokens of which requests a forward pass computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from expertier.routing import Span


def announce_tokens(runner: Any, announce: Callable[[list[Span]], None]) -> None:
    """Have a callable told the tokens of every real forward pass, right before the model runs.

    Upstream: ``GPUModelRunner._model_forward``, made to be overridden by whoever wants to look at the model's input.
    Warm-ups and profiling runs call the model itself. By then the batch has its final order (``InputBatch.req_ids``),
    and ids of tokens that were just sampled are in place, also with asynchronous scheduling.

    Parameters
    ----------
    runner : GPUModelRunner
        The worker's.
    announce : callable
        Told the spans of the step, one for each request.
    """
    stock = runner._model_forward

    def forward(input_ids: torch.Tensor | None = None, *arguments: Any, **named: Any) -> Any:
        announce(_spans(runner, input_ids))
        return stock(input_ids, *arguments, **named)

    runner._model_forward = forward


def _spans(runner: Any, input_ids: torch.Tensor | None) -> list[Span]:
    """One span per request; without ids where the model's input are embeddings."""
    batch = runner.input_batch
    starts = runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
    computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
    ids = None if input_ids is None else input_ids.cpu().numpy()

    def before(row: int, position: int) -> Callable[[], Any]:
        return lambda: batch.token_ids_cpu[row, :position].copy()

    return [
        Span(
            key=request,
            position=computed[row],
            tokens=None if ids is None else ids[starts[row] : starts[row + 1]],
            before=before(row, computed[row]) if computed[row] else None,
        )
        for row, request in enumerate(batch.req_ids[: batch.num_reqs])
    ]


def exact_tokens(runner: Any, asked: Callable[[str], bool]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tokens of the running forward pass are of certain requests, and which are of prompts.

    Upstream: as above, and ``InputBatch.num_prompt_tokens``.

    Parameters
    ----------
    runner : GPUModelRunner
        The worker's.
    asked : callable
        Tells of a request, by its name, whether it is one of them.

    Returns
    -------
    asked, prompt : ndarray of bool, shape (tokens,)
    """
    batch = runner.input_batch
    count = batch.num_reqs
    starts = runner.query_start_loc.np[: count + 1]
    lengths = np.diff(starts)
    chosen = np.array([asked(request) for request in batch.req_ids[:count]], bool)
    # How many of a request's tokens in this pass belong to its prompt; they come first.
    prompt = np.clip(batch.num_prompt_tokens[:count] - batch.num_computed_tokens_cpu[:count], 0, lengths)
    places = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return np.repeat(chosen, lengths), places < np.repeat(prompt, lengths)
