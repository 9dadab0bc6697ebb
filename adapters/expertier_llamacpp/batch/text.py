"""Tokens become text as they come: whole characters only, and nothing that may be the beginning of a stop text."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
from llama_cpp.llama_tokenizer import LlamaTokenizer

_PIECE = 512  # bytes of a token's text, generously


class Pieces:
    """The bytes of every token, asked of llama.cpp once each.

    Parameters
    ----------
    llama : llama_cpp.Llama
        Whose vocabulary it is. A tokenizer that is not llama.cpp's own is asked every time, because its tokens may read
        differently after others.

    Attributes
    ----------
    foreign : bool
        Whether the tokenizer is not llama.cpp's own.
    """

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self._vocab = llama._model.vocab
        own = type(llama.tokenizer_) is LlamaTokenizer
        self._foreign: Any = None if own else llama.tokenizer_
        self.foreign = not own
        self._known: dict[int, bytes] = {}
        self._bos = llama.token_bos()

    def of(self, token: int, before: Sequence[int] = ()) -> bytes:
        """The bytes of `token` when it stands behind the tokens `before`."""
        if self._foreign is not None:
            found: bytes = self._foreign.detokenize([token], prev_tokens=list(before) or None)
            return found
        piece = self._known.get(token)
        if piece is None:
            buffer: Any = (ctypes.c_char * _PIECE)()
            length = llama_cpp.llama_token_to_piece(self._vocab, llama_cpp.llama_token(token), buffer, _PIECE, 0, False)
            if length < 0:  # so many bytes are needed
                buffer = (ctypes.c_char * -length)()
                length = llama_cpp.llama_token_to_piece(
                    self._vocab, llama_cpp.llama_token(token), buffer, -length, 0, False
                )
            piece = self._known[token] = bytes(buffer[:length])
        return piece

    def join(self, tokens: Sequence[int]) -> bytes:
        """The bytes of many tokens, as ``llama_cpp.Llama.detokenize`` gives them."""
        output = b"".join(map(self.of, tokens))
        begins = bool(tokens) and tokens[0] == self._bos
        return output[1:] if begins and output[:1] == b" " else output


class TextStream:
    """The text of one request.

    Parameters
    ----------
    pieces : Pieces
        Bytes of tokens.
    stops : sequence of str
        Texts that end it.

    Attributes
    ----------
    text : str
        What has been given out so far.
    """

    def __init__(self, pieces: Pieces, stops: Sequence[str]) -> None:
        self._pieces = pieces
        self._stops = tuple(stops)
        # As llama_cpp does it: bytes that are no characters are left out.
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._held = ""  # may be the beginning of a stop text
        self.text = ""

    def add(self, token: int, before: Sequence[int]) -> tuple[str, bool]:
        """Take a token; return the text that is certain now, and whether a stop text has come."""
        held = self._held + self._decoder.decode(self._pieces.of(token, before))
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return self._give(held[: min(found)]), True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return self._give(held[: len(held) - keep]), False

    def end(self) -> str:
        """The text that was held back, when no more tokens come."""
        held, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return self._give(held)

    def _give(self, piece: str) -> str:
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
