"""How log-probabilities are written in answers: tokens, their bytes, their places in the text.

Called by the routes of chat and completions; never decides which positions are reported.

A token is told apart by its id, never by its text: one that is not whole characters is written as
its bytes (`bytes:\\xf0\\x9f`, as OpenAI does), and of several with equal text in one position only
the first (the token itself, else the likeliest) by its text, the others as `token_id:123`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.engine.detokenizer import token_stream
from octavo.request import Logprob, PositionLogprobs
from octavo.server.engine_client import ServerTokenizer
from octavo.server.pieces import Lazy

LEAST_LOGPROB = -9999.0
"""OpenAI's number for a token that is all but impossible; JSON has no infinity."""

Positions = Sequence[PositionLogprobs | None]
_Row = tuple[int, float | None, int]
"""A token, its log-probability, and its place in the text."""


@dataclass(frozen=True, slots=True)
class TokenSpelling:
    """How one answer writes tokens."""

    tokenizer: ServerTokenizer
    as_ids: bool = False
    """`token_id:123` for every token, as vLLM's `return_tokens_as_token_ids` wants it."""

    def __call__(self, token_id: int) -> str:
        if self.as_ids:
            return f"token_id:{token_id}"
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    positions: Sequence[PositionLogprobs], num_top: int, spelling: TokenSpelling
) -> dict[str, Any]:
    """Returns the `logprobs` of a chat choice."""

    def entry(one: Logprob) -> dict[str, Any]:
        return {
            "token": spelling(one.token_id),
            "logprob": _finite(one.logprob),
            "bytes": list(spelling.tokenizer.token_bytes(one.token_id)),
        }

    content = (
        {**entry(drawn), "top_logprobs": [entry(one) for one in top[:num_top]]}
        for drawn, *top in positions
    )
    return {"content": Lazy(content, batch=4)}


class CompletionLogprobs:
    """Writes the `logprobs` of one sequence of a completion, piece by piece.

    `text_offset` counts characters of the returned text: a token that goes on with a character
    has the place of that character, one that is not shown the place where it would stand.
    """

    def __init__(self, spelling: TokenSpelling, num_top: int, skip_special_tokens: bool) -> None:
        self._spelling = spelling
        self._num_top = num_top
        self._stream = token_stream(spelling.tokenizer, skip_special_tokens)
        self._offset = 0
        self._echoed: tuple[str, Sequence[int], Positions] = ("", (), ())

    def echo(self, text: str, token_ids: Sequence[int], positions: Positions) -> None:
        """Puts the prompt, of which `text` is returned, before what is written next."""
        self._echoed = (text, token_ids, positions)

    def write(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        """Returns the `logprobs` of the next tokens, after those of an echoed prompt.

        Its lists are lazy; they must be written in their order, and before the next call.
        """
        # Rows without the positions, of which a long prompt's would be 100,000s of objects.
        rows: list[_Row] = []
        echoed = self._echoed[2]

        def tokens() -> Iterator[str]:
            for row in self._rows(positions):
                rows.append(row)
                yield self._spelling(row[0])

        tops = (p and self._tops(p) for p in itertools.chain(echoed, positions))
        return {
            "tokens": Lazy(tokens(), batch=16),
            "token_logprobs": Lazy((logprob for _, logprob, _ in rows), batch=1024),
            "top_logprobs": Lazy(tops, batch=4),
            "text_offset": Lazy((offset for _, _, offset in rows), batch=1024),
        }

    def _rows(self, positions: Sequence[PositionLogprobs]) -> Iterator[_Row]:
        yield from self._echoed_rows()
        for position in positions:
            token_id = position[0].token_id
            place = self._advance(self._stream.push(token_id), self._text(token_id))
            yield token_id, _finite(position[0].logprob), place

    def _echoed_rows(self) -> Iterator[_Row]:
        text, token_ids, positions = self._echoed
        self._echoed = ("", (), ())
        tokenizer = self._spelling.tokenizer
        stream = token_stream(tokenizer, skip_special_tokens=True)
        for token_id, position in zip(token_ids, positions, strict=True):
            new, own = stream.push(token_id), self._text(token_id)
            if tokenizer.is_special(token_id):
                # One that the client wrote is part of the text, one that was put before is not.
                new = own if text.startswith(own, self._offset) else ""
            place = min(self._advance(new, own), len(text))
            logprob = None if position is None else _finite(position[0].logprob)
            yield token_id, logprob, place
        if token_ids:
            self._offset = len(text)

    def _text(self, token_id: int) -> str:
        """Returns a token as text; empty if it is not whole characters."""
        try:
            return self._spelling.tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return ""

    def _advance(self, new: str, own: str) -> int:
        """Takes a token's text `own`, by which the text gains `new`; returns the token's place."""
        place = self._offset
        self._offset += len(new)
        if own and new.endswith(own):
            # What comes before it is a character that nothing went on with: the last token's.
            place = self._offset - len(own)
        return place

    def _tops(self, position: PositionLogprobs) -> dict[str, float]:
        """Returns the chances by token: the drawn one first, then the most likely ones."""
        found: dict[str, float] = {}
        seen: set[int] = set()
        for one in position[: 1 + self._num_top]:
            if one.token_id not in seen:
                seen.add(one.token_id)
                name = self._spelling(one.token_id)
                key = f"token_id:{one.token_id}" if name in found else name
                found[key] = _finite(one.logprob)
        return found


def prompt_logprobs(
    positions: Positions | None, num_top: int, tokenizer: ServerTokenizer
) -> Lazy | None:
    """Returns vLLM's `prompt_logprobs`: per prompt token a map from token id, or None."""
    if positions is None:
        return None

    def entry(one: Logprob) -> dict[str, Any]:
        text = tokenizer.token_bytes(one.token_id).decode("utf-8", "replace")
        return {"logprob": _finite(one.logprob), "rank": one.rank, "decoded_token": text}

    maps = (
        None if p is None else {str(one.token_id): entry(one) for one in p[: 1 + num_top]}
        for p in positions
    )
    return Lazy(maps, batch=4)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
