"""``expertier profile --engine transformers``: routes of a checkpoint without any engine, whole texts at a time.

There is no memory budget here, so the model must fit. It is the quickest way to the many tokens that a predictor learns
from: a text is one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from expertier.catalog.types import Catalog
from expertier.comparison.prompts import Text
from expertier.errors import ExpertierError, UnsupportedEngineError, UnsupportedModelError
from expertier.planning.memory import memory_left
from expertier.routing import TraceRecorder
from expertier.routing.trace_header import trace_header

ENGINE: Final = "transformers"
_GROUPED: Final = ("n_group", "num_expert_group", "topk_group")


def read_checkpoint(
    catalog: Catalog,
    out: Path,
    texts: Sequence[Text],
    *,
    tokens: int,
    per_text: int,
    token_ids: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Record the routes of texts through transformers, and note of which domain each was.

    Parameters
    ----------
    catalog : Catalog
        The checkpoint.
    out : Path
        Trace to write or to continue.
    texts : sequence of Text
        What to read; one without even two tokens is passed over.
    tokens, per_text : int
        Most tokens of all together, and of each.
    token_ids : bool
        Whether they are recorded, too.
    advance : callable
        Told how many tokens were read.

    Raises
    ------
    UnsupportedEngineError
        transformers or torch is not installed.
    UnsupportedModelError
        The model is no checkpoint, does not tell its routers' scores, or does not choose by them alone.
    ExpertierError
        None of the texts could be read.
    """
    if catalog.format != "safetensors":
        raise UnsupportedModelError(
            f"transformers cannot run {catalog.path.name} here.", "Name a checkpoint, or use --engine llamacpp."
        )
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise UnsupportedEngineError(
            "transformers and torch are not installed.", "Install Expertier with its extra: expertier[train]."
        ) from error
    config = transformers.AutoConfig.from_pretrained(catalog.path, local_files_only=True)
    if any((getattr(config, name, None) or 1) > 1 for name in _GROUPED):
        raise UnsupportedModelError(
            f"{catalog.path.name} chooses groups of experts first, which its routers' scores do not tell.",
            "Use --engine llamacpp or --engine vllm.",
        )
    fits = catalog.file_bytes * 2 < memory_left().left
    with _quiet(transformers):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            catalog.path, local_files_only=True, dtype=torch.float32 if fits else "auto"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(catalog.path, local_files_only=True)
    model.eval()
    domains: list[str] = []
    count = 0
    with TraceRecorder(out, trace_header(catalog, engine=ENGINE, tokens=token_ids)) as recorder, torch.inference_mode():
        request = recorder.next_request
        for text in texts:
            ids = tokenizer(text.text, add_special_tokens=False)["input_ids"][: min(per_text, tokens - count)]
            if len(ids) < 2:
                continue
            output = model(torch.tensor([ids]), output_router_logits=True, use_cache=False)
            _record(recorder, catalog, request, np.array(ids), _routes(catalog, output))
            request += 1
            count += len(ids)
            domains.append(text.domain)
            advance(len(ids))
            if tokens - count < 2:
                break
        recorder.note({"domains": domains})
    if not domains:
        raise ExpertierError("No text has even two tokens.", "Name files with some pages of text.")


def _routes(catalog: Catalog, output: Any) -> list[NDArray[np.int64]]:
    """Experts of every token by layer, the likeliest first, each of shape ``(tokens, top_k)``."""
    scores = getattr(output, "router_logits", None) or ()
    found = []
    for layer, of_layer in zip(catalog.layers, scores, strict=False):
        if of_layer.shape[-1] == layer.experts:
            found.append(of_layer.flatten(0, -2).float().topk(layer.top_k).indices.numpy())
    if len(found) != len(catalog.layers):
        raise UnsupportedModelError(
            f"transformers does not tell the routers' scores of every layer of {catalog.path.name}.",
            "Use --engine llamacpp or --engine vllm.",
        )
    return found


def _record(
    recorder: TraceRecorder, catalog: Catalog, request: int, ids: NDArray[Any], routes: list[NDArray[np.int64]]
) -> None:
    for position in range(len(ids)):
        here = slice(position, position + 1)
        recorder.begin_step("decode", requests=request, positions=[position], token_ids=ids[here])
        for layer, chosen in zip(catalog.layers, routes, strict=True):
            recorder.record(layer.layer, chosen[here])
        recorder.end_step()


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep progress bars for weights out of the way; ours follows."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()
