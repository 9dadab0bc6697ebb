"""Has a request go on with given tokens, whatever the model would have said.

Imported by name in vLLM's worker. Upstream, all of it public: ``AdapterLogitsProcessor`` and
``SamplingParams.extra_args``.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

GIVEN: Final = "expertier_given_tokens"
"""Key in ``extra_args``: the tokens that come after the prompt."""


class GivenTokens(AdapterLogitsProcessor):  # type: ignore[misc]
    """Leaves one token to be sampled as long as there are given ones."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        given = (params.extra_args or {}).get(GIVEN)
        if not given:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            place = len(output_ids)
            if place < len(given):
                logits.fill_(float("-inf"))
                logits[given[place]] = 0.0
            return logits

        return force
