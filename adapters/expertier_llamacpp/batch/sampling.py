"""One chain of llama.cpp's samplers per request."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama
from llama_cpp._internals import LlamaSampler

from expertier.errors import RequestError
from expertier_llamacpp.batch.requests import Sampling, TokenLogprobs
from expertier_llamacpp.batch.sequence import Sampler

_LAST = 64  # tokens that penalties look at, llama_cpp's default


def make_sampler(llama: llama_cpp.Llama, sampling: Sampling) -> Any:
    """Build the chain that ``llama_cpp.Llama`` builds for the same options (upstream: ``Llama._init_sampler``).

    Raises
    ------
    RequestError
        When an option is out of its range; llama.cpp would end the process or sample nonsense.
    """
    _check(llama, sampling)
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if sampling.temperature == 0 and penalties == (1.0, 0.0, 0.0):
        return Likeliest(llama.n_vocab(), sampling.logit_bias or {})
    chain = LlamaSampler()  # type: ignore[no-untyped-call]
    if sampling.logit_bias:
        chain.add_logit_bias(llama.n_vocab(), dict(sampling.logit_bias))
    chain.add_penalties(
        n_vocab=llama.n_vocab(),
        penalty_last_n=_LAST,
        penalty_repeat=sampling.repeat_penalty,
        penalty_freq=sampling.frequency_penalty,
        penalty_present=sampling.presence_penalty,
    )
    if sampling.temperature == 0:
        chain.add_greedy()  # type: ignore[no-untyped-call]
        return chain
    chain.add_top_k(sampling.top_k)
    chain.add_typical(sampling.typical_p, 1)
    chain.add_top_p(sampling.top_p, 1)
    chain.add_min_p(sampling.min_p, 1)
    chain.add_temp(sampling.temperature)
    chain.add_dist(random.getrandbits(32) if sampling.seed is None else sampling.seed & 0xFFFFFFFF)
    return chain


class Likeliest:
    """What a chain that ends in llama.cpp's greedy sampler chooses, without the list of candidates it makes first.

    Parameters
    ----------
    width : int
        Size of the vocabulary.
    bias : mapping of int to float
        Added to the logits of these tokens.
    """

    def __init__(self, width: int, bias: Mapping[int, float]) -> None:
        self._width = width
        self._tokens = np.fromiter(bias.keys(), np.int64)
        self._added = np.fromiter(bias.values(), np.float32)

    def sample(self, ctx: Any, idx: int) -> int:
        """Choose from the logits in row `idx`; of equals the first, as llama.cpp does."""
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx.ctx, idx), (self._width,))
        if len(self._tokens):
            logits = logits.copy()
            logits[self._tokens] += self._added
        return int(logits.argmax())


class Watched:
    """A sampler whose choices are written down with their log-probabilities.

    Parameters
    ----------
    sampler : Sampler
        Chooses.
    width : int
        Size of the vocabulary.
    top : int
        So many of the likeliest tokens are written down, too.

    Attributes
    ----------
    seen : list of TokenLogprobs
        One for every choice.

    Raises
    ------
    RequestError
        `top` is not possible.
    """

    def __init__(self, sampler: Sampler, width: int, top: int) -> None:
        if type(top) is not int or not 0 <= top <= width:
            raise RequestError(f"logprobs={top!r} is not possible.", f"Give a whole number from 0 to {width}, or None.")
        self._sampler = sampler
        self._width = width
        self._top = top
        self.seen: list[TokenLogprobs] = []

    def sample(self, ctx: Any, idx: int) -> int:
        """Choose from the logits in row `idx`."""
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx.ctx, idx), (self._width,))
        chances = Llama.logits_to_logprobs(logits)
        token = self._sampler.sample(ctx, idx)
        best = np.argsort(-chances, kind="stable")[: self._top]
        top = dict(zip(best.tolist(), chances[best].tolist(), strict=True))
        self.seen.append(TokenLogprobs(token=token, logprob=float(chances[token]), top=top))
        return token


def _check(llama: llama_cpp.Llama, sampling: Sampling) -> None:
    numbers = {
        name: getattr(sampling, name)
        for name in ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty")
        if not (math.isfinite(getattr(sampling, name)) and getattr(sampling, name) >= 0)
    }
    if numbers:
        name, value = next(iter(numbers.items()))
        raise RequestError(f"{name}={value!r} is not possible.", "Give a number that is not negative.")
    if sampling.repeat_penalty == 0:
        raise RequestError("repeat_penalty=0 is not possible.", "1 is no penalty.")
    wrong = [token for token in sampling.logit_bias or () if not 0 <= token < llama.n_vocab()]
    if wrong:
        raise RequestError(f"logit_bias names token {wrong[0]}, the vocabulary has {llama.n_vocab()}.")
