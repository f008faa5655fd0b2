"""Owns the way from a sequence's growing ids to its growing text, and the search for stop strings.

One Detokenizer per sequence, fed by the output processor. Never looks back further than the last
unfinished character, so a token costs the same at the start and at the end of a sequence.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from octavo.engine.tokenizer import Tokenizer
from octavo.request import SamplingParams

_REPLACEMENT = "\ufffd"


class TextDelta(NamedTuple):
    """What some ids added to a sequence's text."""

    text: str
    """May go out now: no later token can make it part of a stop string."""
    stopped_by: str | None
    """The stop string that was found."""
    num_tokens: int
    """How many of the ids belong to the sequence: fewer than given if a stop string ended it."""


class Pieces(Protocol):
    """What incremental decoding needs of a tokenizer."""

    @property
    def is_byte_level(self) -> bool:
        """Whether a token's bytes do not depend on its neighbours."""
        ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes:
        """Returns what one id adds to the text, as bytes: part of a character, even."""
        ...

    @property
    def whole_texts(self) -> Mapping[int, str | None]:
        """`token_bytes` of each id as text; None if they are not whole characters."""
        ...

    def is_special(self, token_id: int) -> bool: ...

    def is_token(self, token_id: int) -> bool: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class TokenStream(Protocol):
    """Incremental decoding: the texts of all pushes and the flush are the text of all ids."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class ByteStream:
    """For byte-level vocabularies, where a token is bytes and text is their UTF-8."""

    __slots__ = ("_rest", "_skipped", "_token_bytes", "_whole_texts")

    def __init__(self, tokenizer: Pieces, skip_special_tokens: bool) -> None:
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._whole_texts = tokenizer.whole_texts
        self._token_bytes = tokenizer.token_bytes
        self._rest = b""
        """Bytes of a character that has begun."""

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        if not self._rest:
            text = self._whole_texts[token_id]
            if text is not None:
                return text
        return self._decode(self._rest + self._token_bytes(token_id), is_final=False)

    def flush(self) -> str:
        return self._decode(self._rest, is_final=True) if self._rest else ""

    def _decode(self, data: bytes, *, is_final: bool) -> str:
        text, num_read = codecs.utf_8_decode(data, "replace", is_final)
        self._rest = data[num_read:]
        return text


class WindowStream:
    """For all other decoders: decodes a short window of ids twice, without and with the new one.

    The window starts at ids whose text is out already, because a first token may look different
    from a later one (SentencePiece drops a leading space). It moves on when the text ends in a
    whole character.
    """

    def __init__(self, tokenizer: Pieces, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._num_done = 0
        """Ids of the window whose text is out."""
        self._done_text = ""

    def push(self, token_id: int) -> str:
        is_skipped = self._skip and self._tokenizer.is_special(token_id)
        if is_skipped or not self._tokenizer.is_token(token_id):
            return ""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._num_done < _LONGEST_CHARACTER:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._tokenizer.decode(self._ids, skip_special_tokens=self._skip))

    def _advance(self, text: str) -> str:
        """Returns what `text` has beyond the window's text so far, and moves the window."""
        new = text[len(self._done_text) :]
        if new:
            # The next window starts with the ids whose text just went out.
            self._ids = self._ids[self._num_done :]
            self._done_text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        self._num_done = len(self._ids)
        return new


class MarkedStream:
    """Another stream, in which some tokens stand as marks of their own, whole and never skipped."""

    def __init__(self, stream: TokenStream, marks: Mapping[int, str]) -> None:
        self._stream = stream
        self._marks = marks

    def push(self, token_id: int) -> str:
        mark = self._marks.get(token_id)
        return self._stream.push(token_id) if mark is None else self._stream.flush() + mark

    def flush(self) -> str:
        return self._stream.flush()


def token_stream(tokenizer: Pieces, skip_special_tokens: bool) -> TokenStream:
    """Returns the way of incremental decoding that fits a vocabulary."""
    kind = ByteStream if tokenizer.is_byte_level else WindowStream
    return kind(tokenizer, skip_special_tokens)


# Byte tokens of one UTF-8 character; what does not end after so many is no UTF-8.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Text and stop strings of one sequence."""

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, marks: Mapping[int, str] | None = None
    ) -> None:
        """`marks` stand in the text for the tokens of these ids."""
        stream = token_stream(tokenizer, params.skip_special_tokens)
        self._stream = MarkedStream(stream, marks) if marks else stream
        self._stops = params.stop
        self._includes_stop = params.include_stop_str_in_output
        self._num_unstoppable = params.min_tokens
        """Tokens still to come in whose text no stop string may end."""
        self._held = ""
        """Text that could be the beginning of a stop string."""
        self.push = None if self._stops else self._stream.push
        """As `update` of one id, where no text can stop it: returns the text alone."""

    def update(self, token_ids: Sequence[int]) -> TextDelta:
        """Returns what the next ids add; after a stop string was found, call no more."""
        if not self._stops:
            self._num_unstoppable -= len(token_ids)
            push = self._stream.push
            if len(token_ids) == 1:
                return TextDelta(push(token_ids[0]), None, 1)
            return TextDelta("".join(map(push, token_ids)), None, len(token_ids))
        texts: list[str] = []
        for place, token_id in enumerate(token_ids):
            new = self._stream.push(token_id)
            text, stop = self._search(new, may_stop=self._num_unstoppable <= 0)
            self._num_unstoppable -= 1
            texts.append(text)
            if stop is not None:
                return TextDelta("".join(texts), stop, place + 1)
        return TextDelta("".join(texts), None, len(token_ids))

    def finish(self) -> str:
        """Returns the text that was held back, at the end of a sequence that no string stopped."""
        text, self._held = self._held + self._stream.flush(), ""
        return text

    def _search(self, new: str, *, may_stop: bool) -> tuple[str, str | None]:
        """Returns the text that may go out, and the stop string that ends first within `new`, if
        any and if one may. Where it begins does not matter."""
        if not new:
            return "", None
        num_held = len(self._held)
        text, self._held = self._held + new, ""
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if may_stop and (start := text.find(stop, max(0, num_held - len(stop) + 1))) >= 0
        ]
        if ends:
            end, start, stop = min(ends)
            return text[: end if self._includes_stop else start], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], None


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that `stop` begins with."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
