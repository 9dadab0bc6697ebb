"""What is asked of the batch engine and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; names, meaning and defaults are those of ``llama_cpp.Llama.create_completion``.

    Attributes
    ----------
    temperature, top_p, min_p, typical_p, top_k : float
        Temperature 0 takes the likeliest token.
    repeat_penalty, frequency_penalty, presence_penalty : float
        Penalties for tokens among the last 64.
    seed : int or None
        Of this request alone: what else runs does not change its random numbers. ``None`` draws one.
    logit_bias : mapping of int to float, or None
        Added to the logits of these tokens.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_k: int = 40
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with options of its own.

    Attributes
    ----------
    prompt : str or sequence of int
        Text, or tokens that are taken as they are.
    max_tokens : int or None
        Most tokens of output; ``None`` is as many as the context holds.
    stop : sequence of str
        Output ends before the first of these texts.
    sampling : Sampling
        How tokens are chosen.
    priority : int
        Smaller goes first among those that wait.
    exact : bool
        No stand-ins for absent experts in steps that compute it, whoever runs beside it.
    logprobs : int or None
        For every token of output, tell its log-probability and so many of the likeliest tokens; ``None`` tells nothing.
    """

    prompt: str | Sequence[int]
    max_tokens: int | None = 128
    stop: Sequence[str] = ()
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    exact: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """How likely a token of output was, before any sampling parameter.

    Attributes
    ----------
    token : int
        The one that was chosen.
    logprob : float
        Its natural logarithm of probability.
    top : mapping of int to float
        The same of the likeliest tokens, likeliest first.
    """

    token: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a request has produced so far.

    Attributes
    ----------
    index : int
        Which prompt of the call it answers.
    piece : str
        Text since the last output of this request; the pieces together are `text`.
    text : str
        All text.
    tokens : tuple of int
        All tokens of output, a stop text's included; empty while the request is still running.
    prompt_tokens : int
        Tokens of the prompt.
    finish_reason : str or None
        ``None`` while it runs; "stop" at the end of the text or at a stop text, "length", "cancelled" or "error".
    error : Exception or None
        Why it failed.
    logprobs : tuple of TokenLogprobs
        One for each of `tokens`, if they were asked for.
    """

    index: int
    piece: str
    text: str
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
