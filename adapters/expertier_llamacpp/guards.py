"""Requests that llama.cpp would end the process for are errors of those who ask."""

from __future__ import annotations

from typing import Any

import llama_cpp

from expertier.errors import RequestError


class GuardedRequests(llama_cpp.Llama):
    """The stock class, which hands some of what clients may send to llama.cpp unseen."""

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        # Upstream: LlamaSampler.add_grammar (llama_cpp/_internals.py) passes a null pointer on.
        if (grammar := options.get("grammar")) is not None:
            text, root = grammar._grammar.encode(), grammar._root.encode()
            sampler = llama_cpp.llama_sampler_init_grammar(self._model.vocab, text, root)
            if not sampler:
                raise RequestError("llama.cpp cannot parse the grammar.", "What is wrong is on the standard error.")
            llama_cpp.llama_sampler_free(sampler)
        return super()._init_sampler(*args, **options)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """As the stock method; a number that is no token's is an error."""
        # Upstream: llama_vocab::impl::token_to_piece (src/llama-vocab.cpp) throws where nobody catches.
        known = self.n_vocab()
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < known:
            wrong = next(token for token in tokens if not 0 <= token < known)
            raise RequestError(f"There is no token {wrong}.", f"The vocabulary has {known} tokens.")
        return super().detokenize(tokens, prev_tokens, special)
