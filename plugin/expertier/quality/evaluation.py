"""Teacher forcing: given texts decoded token by token under the real residency, against the exact model.

A perplexity run over wide batches would hide what a lossy mode costs, because residency is not in the state of decoding
there. So every position is a decode step of its own, and its logits are compared with those the exact model had at the
same position: in cross-entropy (what the text says), in KL divergence (what the exact model says, much less noisy) and
in the likeliest token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from expertier.comparison.prompts import Text, interleaved
from expertier.errors import ExpertierError
from expertier.quality.statistics import Interval, bootstrap
from expertier.telemetry import Stats

_CHARACTERS_PER_TOKEN = 16  # more than any text needs


class TeacherForced(Protocol):
    """A session of an engine that can be fed given tokens and asked what it would have said."""

    def tokenize(self, text: str) -> list[int]:
        """Turn text into token ids, nothing added."""

    def follow(self, tokens: Sequence[int], *, prompt: int) -> Iterator[None]:
        """Compute given tokens: `prompt` of them at once, then one after the other; yields after every step."""

    def logits(self) -> NDArray[np.float32]:
        """Return logits after the last step of :meth:`follow`, shape ``(vocabulary,)``; valid until the next step."""

    def substituted(self) -> NDArray[np.float64]:
        """Sum over decoded tokens of the gate mass that stand-ins took, shape ``(layers,)``; zeros where none may."""

    def stats(self) -> Stats:
        """Return the manager's counters."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text as tokens; the name of its domain comes along."""

    domain: str
    tokens: tuple[int, ...]


def samples(session: TeacherForced, texts: Sequence[Text], *, count: int, tokens: int) -> tuple[Sample, ...]:
    """Cut `count` samples of at most `tokens` tokens, one of every domain first, then the second ones.

    Raises
    ------
    ExpertierError
        No text has two tokens.
    """
    found: list[Sample] = []
    for text in interleaved(texts):
        ids = session.tokenize(text.text[: tokens * _CHARACTERS_PER_TOKEN])[:tokens]
        if len(ids) >= 2:
            found.append(Sample(domain=text.domain, tokens=tuple(ids)))
        if len(found) == count:
            break
    if not found:
        raise ExpertierError("No text has even two tokens.", "Name files with some pages of text.")
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class TextFigures:
    """Sums over the positions of one text.

    Attributes
    ----------
    domain : str
        What kind of text.
    tokens : int
        Tokens that were predicted.
    nll, exact_nll : float
        Negative log-likelihood of the text in nats, as measured and of the exact model.
    kl : float
        KL divergence of the measured from the exact distribution, in nats.
    agreed : int
        Positions at which both have the same likeliest token.
    loads, bytes_read : int
        Loads begun on demand, and bytes read.
    substituted : tuple of float
        Gate mass taken by stand-ins, per layer.
    """

    domain: str
    tokens: int
    nll: float
    exact_nll: float
    kl: float
    agreed: int
    loads: int
    bytes_read: int
    substituted: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured over all texts."""

    texts: tuple[TextFigures, ...]

    @cached_property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(text.tokens for text in self.texts)

    @property
    def cross_entropy(self) -> float:
        """Nats per token."""
        return self._per_token("nll")

    @property
    def exact_cross_entropy(self) -> float:
        """Nats per token of the exact model."""
        return self._per_token("exact_nll")

    @property
    def kl(self) -> float:
        """Nats per token."""
        return self._per_token("kl")

    @property
    def agreement(self) -> float:
        """Share of positions with the same likeliest token."""
        return self._per_token("agreed")

    @property
    def loads_per_token(self) -> float:
        """Loads begun on demand."""
        return self._per_token("loads")

    @property
    def bytes_per_token(self) -> float:
        """Bytes read from storage."""
        return self._per_token("bytes_read")

    @property
    def substituted(self) -> NDArray[np.float64]:
        """Gate mass taken by stand-ins per token, shape ``(layers,)``."""
        total: NDArray[np.float64] = np.array([text.substituted for text in self.texts]).sum(0)
        return total / self.tokens

    def perplexity_increase(self) -> Interval:
        """Relative increase of the perplexity (0.01 = 1 %), with its 90 % confidence interval over texts."""
        tokens = np.array([text.tokens for text in self.texts], float)
        gained = np.array([text.nll - text.exact_nll for text in self.texts])
        return bootstrap(gained, tokens).map(np.expm1)

    def kl_interval(self) -> Interval:
        """KL divergence per token with its 90 % confidence interval over texts."""
        tokens = np.array([text.tokens for text in self.texts], float)
        return bootstrap(np.array([text.kl for text in self.texts]), tokens)

    def _per_token(self, name: str) -> float:
        return float(sum(getattr(text, name) for text in self.texts)) / self.tokens


class Reference:
    """The exact model's logits at every position of some texts, kept in a temporary file.

    They are kept as the engine gave them: a lossy mode that changes nothing has a divergence of exactly zero.

    Parameters
    ----------
    session : TeacherForced
        The exact model.
    texts : sequence of Sample
        The texts.
    advance : callable, optional
        Told after every token.
    """

    def __init__(
        self, session: TeacherForced, texts: Sequence[Sample], advance: Callable[[int], None] = lambda _: None
    ) -> None:
        self.texts = tuple(texts)
        self._file = tempfile.TemporaryFile(prefix="expertier-logits-")  # noqa: SIM115 - closed by close()
        rows = 0
        for text in self.texts:
            for _ in session.follow(text.tokens[:-1], prompt=1):
                row = np.ascontiguousarray(session.logits(), np.float32)
                self._file.write(row.data)
                rows += 1
                advance(1)
        self._file.flush()
        self._rows = np.memmap(self._file, np.float32, "r", shape=(rows, row.size))

    def row(self, index: int) -> NDArray[np.float32]:
        """Logits at the `index`-th position, counted over all texts."""
        found: NDArray[np.float32] = self._rows[index]
        return found

    def close(self) -> None:
        """Delete the file."""
        del self._rows
        self._file.close()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluate(
    session: TeacherForced,
    reference: Reference,
    *,
    warm_up: Sequence[int] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Decode the reference's texts and compare position by position.

    Parameters
    ----------
    session : TeacherForced
        The model in the mode to be measured.
    reference : Reference
        The exact model on the same texts.
    warm_up : sequence of int
        Tokens decoded first and not counted, so that the resident set is that of decoding.
    advance : callable, optional
        Told after every token.
    """
    for _ in session.follow(warm_up, prompt=1) if warm_up else ():
        pass
    figures, row = [], 0
    for text in reference.texts:
        nll = exact_nll = divergence = 0.0
        agreed = 0
        stats, substituted = session.stats(), session.substituted().copy()
        for following, _ in zip(text.tokens[1:], session.follow(text.tokens[:-1], prompt=1), strict=True):
            found = compare(session.logits(), reference.row(row), following)
            nll += found.nll
            exact_nll += found.exact_nll
            divergence += found.kl
            agreed += found.agreed
            row += 1
            advance(1)
        after = session.stats()
        figures.append(
            TextFigures(
                domain=text.domain,
                tokens=len(text.tokens) - 1,
                nll=float(nll),
                exact_nll=float(exact_nll),
                kl=divergence,
                agreed=agreed,
                loads=after.decode.misses + after.decode.late - stats.decode.misses - stats.decode.late,
                bytes_read=after.bytes_read - stats.bytes_read,
                substituted=tuple((session.substituted() - substituted).tolist()),
            )
        )
    return Evaluation(texts=tuple(figures))


class Compared(NamedTuple):
    """One position of a lossy run beside the exact one: nats, and whether the likeliest token is the same."""

    nll: float
    exact_nll: float
    kl: float
    agreed: bool


def compare(logits: NDArray[np.float32], exact: NDArray[np.float32], following: int) -> Compared:
    """Compare two predictions of the token `following`, both of shape ``(vocabulary,)``."""
    here, there = log_softmax(logits), log_softmax(exact)
    return Compared(
        nll=float(-here[following]),
        exact_nll=float(-there[following]),
        kl=float(np.exp(there) @ (there - here)),
        agreed=bool(here.argmax() == there.argmax()),
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities in double precision.

    Raises
    ------
    ExpertierError
        A logit is not a number.
    """
    row = np.asarray(logits, np.float64)
    top = row.max()
    if not np.isfinite(top):
        raise ExpertierError("The model gave logits that are not numbers.", "Check the model file with the engine.")
    shifted = row - top
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
