"""Pieces that the answers of chat and completions share: usage, and the chunks of streams.

Called by the routes. Plain dicts and bytes, since every streamed token passes here; never waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.outputs import OutputDelta
from octavo.server.call import Call
from octavo.server.protocol.sampling import SamplingFields
from octavo.server.streaming import DONE, event, event_pieces

Choice = Callable[[int, str], dict[str, Any]]
"""Makes the choice of a sequence, by its index, that adds a text."""
_encode = msgspec.json.Encoder().encode
_TEXT_MARK = "\x00text\x00"
_MARK = _encode(_TEXT_MARK)
_END = b"}\n\n"
"""Of an object in an event."""


@dataclass(slots=True)
class Usage:
    """Tokens of one call: of all its prompts, and of all their sequences so far."""

    num_prompt: int
    is_prompt_only: bool = False
    num_generated: int = 0
    num_cached: int = 0
    num_reasoning: int = 0

    @staticmethod
    def of(call: Call, is_prompt_only: bool = False) -> Usage:
        return Usage(sum(request.prompt_len for request in call.requests), is_prompt_only)

    def add(self, delta: OutputDelta, is_first: bool) -> None:
        """Counts what was added to a sequence; a prompt's cached tokens come with its first."""
        if not self.is_prompt_only:
            self.num_generated += len(delta.token_ids)
        if is_first:
            self.num_cached += delta.num_cached_tokens

    def add_reasoning(self, num_tokens: int) -> None:
        """Counts tokens of a reasoning, which are among those generated."""
        self.num_reasoning += num_tokens

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's usage object."""
        body: dict[str, Any] = {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }
        if self.num_reasoning:
            body["completion_tokens_details"] = {"reasoning_tokens": self.num_reasoning}
        return body


class ChunkFrame:
    """What all chunks of one stream have in common; makes them server-sent events."""

    def __init__(
        self, call: Call, body: SamplingFields, usage: Usage, *, kind: str, model: str
    ) -> None:
        self._common = {"id": call.id, "object": kind, "created": call.created, "model": model}
        self._usage = usage
        self._includes_usage = body.includes_usage
        self.has_continuous_usage = body.has_continuous_usage
        self._before = event(self._common)[: -len(_END)] + b',"choices":['
        self._after = (b'],"usage":null' if body.includes_usage else b"]") + _END

    def event(self, choice: dict[str, Any], **more: Any) -> bytes:
        """Returns a chunk with one choice, and the usage so far if the client wants it."""
        if more or self.has_continuous_usage:
            return event(self._chunk(choice, more))
        return b"".join((self._before, _encode(choice), self._after))

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        """Returns a chunk before and after the text of its choice, of which these are the parts."""
        return self._before + before, after + self._after

    def event_pieces(self, choice: dict[str, Any]) -> Iterator[bytes]:
        """Returns the same in pieces, if the choice has lazy lists."""
        return event_pieces(self._chunk(choice, {}))

    def _chunk(self, choice: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._common, "choices": [choice], **more}
        if self.has_continuous_usage:
            chunk["usage"] = self._usage.body()
        elif self._includes_usage:
            chunk["usage"] = None
        return chunk

    def end(self) -> bytes:
        """Returns the end of the stream, and before it a chunk without a choice but with the usage,
        if the client wants it."""
        if not self._includes_usage:
            return DONE
        usage = _encode(self._usage.body())
        return b"".join((self._before, b'],"usage":', usage, _END, DONE))


class PlainChunks:
    """Chunks that differ in their text alone: nearly all of nearly all streams.

    What stands before and after the text is encoded once for each sequence, so that a token costs
    the encoding of its text.
    """

    def __init__(self, frame: ChunkFrame, choice: Choice, num_sequences: int) -> None:
        """`choice` makes that of a sequence with a text."""
        self._parts = [frame.around(*_around_text(choice, one)) for one in range(num_sequences)]

    def event(self, sequence: int, text: str) -> bytes:
        """Returns the chunk that adds `text` to a sequence."""
        before, after = self._parts[sequence]
        return before + _encode(text) + after


@functools.lru_cache(maxsize=1024)
def _around_text(choice: Choice, index: int) -> tuple[bytes, bytes]:
    """Returns the JSON of a choice before and after its text, which is the same for all streams."""
    before, after = _encode(choice(index, _TEXT_MARK)).split(_MARK)
    return before, after
