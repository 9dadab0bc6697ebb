"""Requests for a real server: many clients with real text of several kinds, or what a log recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from expertier.comparison.prompts import Text
from expertier.errors import ExpertierError, UnsupportedOptionError

_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer packs into one, on average


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request.

    Attributes
    ----------
    prompt : tuple of int
        Its tokens.
    output : int
        Tokens that are wanted.
    domain : str
        What kind of text it is; empty if unknown.
    at : float or None
        Second at which it comes, if a log says so.
    given : tuple of int
        Tokens of the answer, whatever the model would say; empty if it is the model's own.
    """

    prompt: tuple[int, ...]
    output: int
    domain: str = ""
    at: float | None = None
    given: tuple[int, ...] = ()


def mixed_requests(
    texts: Sequence[Text],
    tokenize: Callable[[str], Sequence[int]],
    count: int,
    *,
    domains: int | None,
    prompt: tuple[int, int],
    output: tuple[int, int],
    seed: int,
) -> list[Ask]:
    """Make requests of random length, as many of each domain, in random order.

    Answers are how the texts go on, because what a model writes itself repeats itself, and what repeats itself shares
    its experts. They are shorter than drawn where a text ends before.

    Parameters
    ----------
    texts : sequence of Text
        Each begins at most one prompt, as long as there are enough.
    tokenize : callable
        Text to token ids.
    count : int
        Requests.
    domains : int or None
        Kinds of text, drawn at random from those that have the most texts; ``None`` for all of these.
    prompt, output : tuple of int
        Least and most tokens.
    seed : int
        Of everything random.

    Raises
    ------
    UnsupportedOptionError
        There are fewer domains.
    """
    random = np.random.default_rng(seed)
    piles: dict[str, list[Text]] = {}
    for text in texts:
        piles.setdefault(text.domain, []).append(text)
    most = max((len(pile) for pile in piles.values()), default=0)
    names = sorted(name for name, pile in piles.items() if 2 * len(pile) >= most)
    domains = len(names) if domains is None else domains
    if domains > len(names):
        raise UnsupportedOptionError(
            f"There are {len(names)} domains with enough texts, not {domains}.", "Name more text, or ask for fewer."
        )
    names = sorted(random.choice(names, domains, replace=False).tolist())
    shuffled = {name: random.permutation(len(piles[name])).tolist() for name in names}
    asks = []
    for number in range(count):
        name = names[number % domains]
        text = piles[name][shuffled[name][number // domains % len(shuffled[name])]]
        length = int(random.integers(prompt[0], prompt[1] + 1))
        answer = int(random.integers(output[0], output[1] + 1))
        tokens = tokenize(text.text[: (length + answer) * _CHARACTERS_PER_TOKEN])[: length + answer]
        given = tuple(tokens[length:])
        asks.append(Ask(prompt=tuple(tokens[:length]), output=len(given) or answer, domain=text.domain, given=given))
    return [asks[place] for place in random.permutation(count)]


def read_request_log(path: Path, tokenize: Callable[[str], Sequence[int]]) -> list[Ask]:
    """Read a log of requests.

    Parameters
    ----------
    path : Path
        A JSON object per line: ``prompt`` (text, or a list of token ids), ``tokens`` (wanted), and, if known, ``at``
        (seconds) and ``domain``.
    tokenize : callable
        Text to token ids.

    Returns
    -------
    list of Ask
        In order of arrival; the first comes at second 0.

    Raises
    ------
    ExpertierError
        It cannot be read, or a line is of another form; with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ExpertierError(f"Cannot read the log {path}: {error.strerror}.", "Check the path.") from error
    asks = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                asks.append(_ask(json.loads(line), tokenize))
            except (ValueError, KeyError, TypeError) as error:
                raise ExpertierError(
                    f"Line {number} of {path} is no request: {error}.",
                    'Write e.g. {"at": 0.5, "prompt": "Some text", "tokens": 64}.',
                ) from error
    if not asks:
        raise ExpertierError(f"{path} holds no request.", "Record some.")
    timed = [ask.at for ask in asks if ask.at is not None]
    if timed and len(timed) < len(asks):
        raise ExpertierError(f"Some lines of {path} say when, others do not.", "Give all of them `at`, or none.")
    if not timed:
        return asks
    start = min(timed)
    moved = [replace(ask, at=(ask.at or 0.0) - start) for ask in asks]
    return sorted(moved, key=lambda ask: ask.at or 0.0)


def _ask(item: Any, tokenize: Callable[[str], Sequence[int]]) -> Ask:
    prompt, output, at = item["prompt"], item["tokens"], item.get("at")
    tokens = tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not tokens or type(output) is not int or output < 1:
        raise ValueError("an empty prompt, or no number of tokens")
    if at is not None and not (type(at) in (int, float) and np.isfinite(at)):
        raise ValueError(f"at={at!r}")
    return Ask(prompt=tuple(tokens), output=output, domain=str(item.get("domain", "")), at=at)
