"""Which tokens a sequence has had: positions and ids of an engine's steps become growth and rewinds of sequences."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MOST = 1024  # sequences remembered; engines do not say when one is over


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Neighbouring tokens of one sequence in a step.

    Attributes
    ----------
    key : hashable
        What the engine calls the sequence.
    position : int
        Place of the first token in its sequence.
    tokens : sequence of int, or None
        Token ids; ``None`` where the input has none (embeddings).
    before : callable, optional
        Gives the ids of all `position` tokens before, where the engine knows them although no step has computed them
        (a prefix taken from a cache).
    """

    key: Hashable
    position: int
    tokens: Sequence[int] | None
    before: Callable[[], Sequence[int]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What happened to a sequence.

    Attributes
    ----------
    sequence : int
        Its number; a number is never given to another sequence.
    keep : int
        So many of its known tokens stay, those behind them are forgotten: 0 for one that is new or begins again, fewer
        than there were when the engine went back (a prompt's prefix used again, a draft rejected).
    tokens : ndarray of int64, shape (n,)
        Known ids that follow those kept. The last `rows` are the ones this step computes.
    rows : int
        Tokens of the step.
    """

    sequence: int
    keep: int
    tokens: NDArray[np.int64]
    rows: int


@dataclass(slots=True)
class _Known:
    number: int
    first: int  # position of the first token we know
    length: int  # tokens we know


class Sequences:
    """Follows an engine's sequences by the positions of the tokens it computes.

    Parameters
    ----------
    forgotten : callable, optional
        Told the number of every sequence that is not followed any more.
    most : int
        Sequences followed at a time; the one that was not heard of for longest is forgotten first.

    Notes
    -----
    Engines cut, copy and shift sequences without telling us. What counts is where the next token stands: right behind
    the last one the sequence goes on, further ahead its beginning is unknown, further back it was cut.
    """

    def __init__(self, forgotten: Callable[[int], None] | None = None, *, most: int = _MOST) -> None:
        self._forgotten = forgotten or (lambda _: None)
        self._most = most
        self._known: dict[Hashable, _Known] = {}  # least recently heard of first
        self._next = 0

    def __len__(self) -> int:
        return len(self._known)

    def step(self, spans: Sequence[Span]) -> list[Growth | None]:
        """Note a step's tokens.

        Parameters
        ----------
        spans : sequence of Span
            Its tokens; a sequence may have several spans, in order.

        Returns
        -------
        list of Growth or None
            For every span what happened; ``None`` where the ids are not known.
        """
        grown = [self._note(span) for span in spans]
        while len(self._known) > self._most:
            self.forget(next(iter(self._known)))
        return grown

    def _note(self, span: Span) -> Growth | None:
        if span.tokens is None:
            self.forget(span.key)
            return None
        known = self._known.pop(span.key, None)
        tokens = np.asarray(span.tokens, np.int64)
        if known is not None and known.first <= span.position <= known.first + known.length:
            keep = span.position - known.first
        else:
            before = np.asarray(span.before(), np.int64) if span.before is not None else np.empty(0, np.int64)
            if known is None:
                known = _Known(self._next, 0, 0)
                self._next += 1
            known.first = span.position - len(before)
            keep = 0
            tokens = np.concatenate([before, tokens])
        known.length = keep + len(tokens)
        self._known[span.key] = known
        return Growth(sequence=known.number, keep=keep, tokens=tokens, rows=len(span.tokens))

    def forget(self, key: Hashable) -> None:
        """Stop following a sequence."""
        known = self._known.pop(key, None)
        if known is not None:
            self._forgotten(known.number)
