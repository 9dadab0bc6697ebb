"""Has a request go on with given tokens, whatever the model would have said, and notes what it would have said.

Imported by name in vLLM's worker. Upstream, all of it public: ``AdapterLogitsProcessor`` and
``SamplingParams.extra_args``. Engines that others can reach must not load it: a request names a file to be written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

GIVEN: Final = "expertier_given_tokens"
"""Key in ``extra_args``: the tokens that come after the prompt."""

LOGITS: Final = "expertier_logits"
"""Key in ``extra_args``: a file that exists; what the model says goes into it, one row of float32 per sampled token."""


class GivenTokens(AdapterLogitsProcessor):  # type: ignore[misc]
    """Leaves one token to be sampled as long as there are given ones."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        wishes = params.extra_args or {}
        given, path = wishes.get(GIVEN) or (), wishes.get(LOGITS)
        if not given and path is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            place = len(output_ids)
            if path is not None:
                _write(Path(path), place, logits)
            if place < len(given):
                logits.fill_(float("-inf"))
                logits[given[place]] = 0.0
            return logits

        return force


def _write(path: Path, place: int, logits: torch.Tensor) -> None:
    row = logits.to("cpu", torch.float32).numpy()
    with path.open("r+b") as file:
        file.seek(place * row.nbytes)
        file.write(row.data)
