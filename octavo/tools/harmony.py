"""Grammar of answers in channels, as gpt-oss writes them: reasoning, calls and text are messages.

    <|channel|>analysis<|message|>TEXT<|end|><|start|>assistant<|channel|>commentary
    to=functions.f <|constrain|>json<|message|>{...}<|call|>

Called by `answer_parser` in place of markers within a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from octavo.tools.calls import Calls
from octavo.tools.marks import Marks
from octavo.tools.source import BrokenCallError, Markers, Source, Step

CHANNEL, MESSAGE, START, CONSTRAIN = "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
TEXTS = (CHANNEL, MESSAGE, START, CONSTRAIN, *ENDS)
_MAX_HEADER = 512
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")

EmitAs = Callable[[str], Callable[[str], None]]
"""From "content" or "reasoning" to what takes its text."""


class Harmony:
    """The grammar with marks in place of special tokens."""

    def __init__(self, marks: Marks) -> None:
        self._message = Markers((marks.bind(MESSAGE),))
        self._ends = Markers(map(marks.bind, (START, CHANNEL, *ENDS)))
        self._start = Markers(map(marks.bind, (START, *ENDS)))
        self._channel = marks.bind(CHANNEL)
        self._constrain = marks.bind(CONSTRAIN)

    def read(self, source: Source, calls: Calls | None, emit_as: EmitAs) -> Step[None]:
        """Reads a whole answer; without `calls` those are content."""
        while (yield from source.more()):
            yield from source.accept(self._start)
            if not (yield from source.more()):
                return
            source.keep()
            try:
                header, _ = yield from source.read(self._message, _MAX_HEADER)
            except BrokenCallError:
                source.go_back()
                yield from source.until(self._start, emit_as("content"))
                continue
            source.release()
            yield from self._body(header, source, calls, emit_as)

    def _body(
        self, header: str, source: Source, calls: Calls | None, emit_as: EmitAs
    ) -> Step[None]:
        _, _, channel = header.partition(self._channel)
        recipient = _RECIPIENT.search(
            header.replace(self._constrain, " ").replace(self._channel, " ")
        )
        if recipient is not None and calls is not None:
            calls.begin(recipient[1])
            yield from source.skip_space()
            end = yield from source.until(self._ends, calls.add)
            calls.end()
        else:
            kind = "reasoning" if channel.lstrip().startswith("analysis") else "content"
            end = yield from source.until(self._ends, emit_as(kind))
        if end == self._channel:
            source.unread(len(end))
