"""A grammar that cannot be parsed is an error and not the end of the process."""

from __future__ import annotations

from typing import Any

import llama_cpp

from expertier.errors import RequestError


class CheckedGrammars(llama_cpp.Llama):
    """The stock class, which hands llama.cpp a sampler that it could not make where a grammar is wrong.

    llama.cpp follows the null pointer: whoever asks a server with such a grammar would end it for everybody. Upstream:
    ``LlamaSampler.add_grammar`` (llama_cpp/_internals.py).
    """

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        if (grammar := options.get("grammar")) is not None:
            text, root = grammar._grammar.encode(), grammar._root.encode()
            sampler = llama_cpp.llama_sampler_init_grammar(self._model.vocab, text, root)
            if not sampler:
                raise RequestError("llama.cpp cannot parse the grammar.", "What is wrong is on the standard error.")
            llama_cpp.llama_sampler_free(sampler)
        return super()._init_sampler(*args, **options)
