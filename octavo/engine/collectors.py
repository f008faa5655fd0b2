"""Receivers that keep what requests give until it is asked for: answers, messages, vectors.

Used by `LLM`, whose requests run in its own process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from octavo.errors import OctavoError
from octavo.outputs import OutputDelta, RequestOutput, with_texts
from octavo.request import Request
from octavo.tools.answers import AnswerReader, AnswerReading, AnswerSum, message_of


class Collector:
    """The receiver that adds up one request's output."""

    def __init__(
        self, request: Request, prompt: str | None, token_text: Callable[[int], str | None]
    ) -> None:
        self.output = RequestOutput.empty(request, request.request_id, prompt)
        self._token_text = token_text

    marks: Mapping[int, str] | None = None
    """What stands in the text of deltas for the tokens of these ids."""

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        self.output.add(with_texts(delta, self._token_text))

    def grew(self, delta: OutputDelta, num_tokens: int) -> None:
        raise AssertionError("no delta waits here")

    def fail(self, error: OctavoError) -> None:
        raise error


class VectorCollector:
    """The receiver of one request that wants a vector."""

    def __init__(self) -> None:
        self.delta = OutputDelta(index=0)

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        self.delta = delta

    def grew(self, delta: OutputDelta, num_tokens: int) -> None:
        raise AssertionError("a vector does not grow")

    def fail(self, error: OctavoError) -> None:
        raise error


class ChatCollector(Collector):
    """The receiver of one chat: it adds up the message of every sequence, too."""

    def __init__(
        self,
        request: Request,
        token_text: Callable[[int], str | None],
        reading: AnswerReading | None,
    ) -> None:
        super().__init__(request, None, token_text)
        self._skips_special_tokens = request.params.skip_special_tokens
        self._reading = reading
        self._readers: list[AnswerReader] = []
        self._sums: list[AnswerSum] = []
        if reading is not None:
            self.marks = reading.marks.by_id
            self._readers = [reading.begin() for _ in range(request.params.n)]
            self._sums = [AnswerSum() for _ in self._readers]

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        sequence = self.output.outputs[delta.index]
        reason = delta.finish_reason
        if self._reading is None:
            super().receive(delta, finished)
            if reason is not None:
                sequence.message = {"role": "assistant", "content": sequence.text}
            return
        total = self._sums[delta.index]
        total.add(self._readers[delta.index].push(delta.text, delta.token_ids, reason))
        marks = self._reading.marks
        text = marks.drop(delta.text) if self._skips_special_tokens else marks.show(delta.text)
        super().receive(msgspec.structs.replace(delta, text=text), finished)
        if reason is not None:
            sequence.message = message_of(total.total())
