"""The output items of a response as they grow, and the events that tell of it.

Made by `response_answer` for each response. An item is opened, gains text, and is closed before the
next one is opened: the texts of its events join to what the closed item has. Never numbers or
encodes an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from octavo.request import PositionLogprobs
from octavo.server.pieces import Lazy
from octavo.server.protocol.response_items import output_id, packed_reasoning
from octavo.tools.answers import INPUTS, AnswerDelta, CallDelta
from octavo.tools.definitions import Kind

Event = dict[str, Any]
Positions = Sequence[PositionLogprobs]
Logprobs = Callable[[Positions], Lazy | list[Any]]
"""Writes log-probabilities; a lazy list can be written once."""

COMPLETED, INCOMPLETE, IN_PROGRESS = "completed", "incomplete", "in_progress"


class _Item:
    """An item that is open, or was."""

    id_kind = ""

    def __init__(self, response_key: str, number: int) -> None:
        self.id = output_id(self.id_kind, response_key, number)
        self.status = IN_PROGRESS
        self._number = number
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def body(self) -> dict[str, Any]:
        """Returns the item as answers have it."""
        raise NotImplementedError

    def opened(self) -> Iterator[Event]:
        yield self._event("output_item.added", item=self.body(), item_id=None)

    def add(self, text: str) -> Iterator[Event]:
        self._pieces.append(text)
        yield from ()

    def closed(self, status: str) -> Iterator[Event]:
        self.status = status
        yield self._event("output_item.done", item=self.body(), item_id=None)

    def _event(self, kind: str, **more: Any) -> Event:
        event = {"type": f"response.{kind}", "output_index": self._number, "item_id": self.id}
        return {name: one for name, one in {**event, **more}.items() if one is not None}


class _Text(_Item):
    """An item with one part of text."""

    part_type = ""

    def part(self) -> dict[str, Any]:
        return {"type": self.part_type, "text": self.text}

    def opened(self) -> Iterator[Event]:
        yield from super().opened()
        yield self._event("content_part.added", content_index=0, part=self.part())

    def closed(self, status: str) -> Iterator[Event]:
        yield self._done()
        yield self._event("content_part.done", content_index=0, part=self.part())
        yield from super().closed(status)

    def add(self, text: str) -> Iterator[Event]:
        yield from super().add(text)
        yield self._event(f"{self.part_type}.delta", content_index=0, delta=text)

    def _done(self) -> Event:
        return self._event(f"{self.part_type}.done", content_index=0, text=self.text)


class _Message(_Text):
    id_kind, part_type = "msg", "output_text"

    def __init__(self, response_key: str, number: int, logprobs: Logprobs) -> None:
        super().__init__(response_key, number)
        self._positions: list[PositionLogprobs] = []
        self._logprobs = logprobs

    def part(self) -> dict[str, Any]:
        return {**super().part(), "annotations": [], "logprobs": self._logprobs(self._positions)}

    def body(self) -> dict[str, Any]:
        content = [] if self.status == IN_PROGRESS else [self.part()]
        return {
            "id": self.id,
            "type": "message",
            "status": self.status,
            "role": "assistant",
            "content": content,
        }

    def add_with(self, text: str, positions: Positions) -> Iterator[Event]:
        """Adds text and the log-probabilities of its tokens."""
        self._positions.extend(positions)
        for event in self.add(text):
            yield {**event, "logprobs": self._logprobs(positions)}

    def _done(self) -> Event:
        return {**super()._done(), "logprobs": self._logprobs(self._positions)}


class _Reasoning(_Text):
    id_kind, part_type = "rs", "reasoning_text"

    def __init__(self, response_key: str, number: int, is_packed: bool) -> None:
        super().__init__(response_key, number)
        self._is_packed = is_packed

    def body(self) -> dict[str, Any]:
        is_open = self.status == IN_PROGRESS
        body: dict[str, Any] = {"id": self.id, "type": "reasoning", "status": self.status}
        body |= {"summary": [], "content": [] if is_open else [self.part()]}
        if self._is_packed and not is_open:
            body["encrypted_content"] = packed_reasoning(self.text)
        return body


class _Call(_Item):
    """A call of a function, or of a custom tool."""

    event_kinds: dict[Kind, str] = {  # noqa: RUF012 - the same for all
        "function": "function_call_arguments",
        "custom": "custom_tool_call_input",
    }

    def __init__(self, response_key: str, number: int, call: CallDelta) -> None:
        self.id_kind = "fc" if call.kind == "function" else "ctc"
        super().__init__(response_key, number)
        self._call = call
        self._given = INPUTS[call.kind]
        self._event_kind = self.event_kinds[call.kind]

    def body(self) -> dict[str, Any]:
        kind = "function_call" if self._call.kind == "function" else "custom_tool_call"
        return {
            "id": self.id,
            "type": kind,
            "status": self.status,
            "call_id": self._call.id,
            "name": self._call.name,
            self._given: self.text,
        }

    def add(self, text: str) -> Iterator[Event]:
        yield from super().add(text)
        yield self._event(f"{self._event_kind}.delta", delta=text)

    def closed(self, status: str) -> Iterator[Event]:
        yield self._event(f"{self._event_kind}.done", **{self._given: self.text})
        yield from super().closed(status)


class OutputItems:
    """The items of one response."""

    def __init__(self, response_key: str, logprobs: Logprobs, packs_reasoning: bool) -> None:
        self._key = response_key
        self._logprobs = logprobs
        self._packs_reasoning = packs_reasoning
        self._items: list[_Item] = []
        self._open: _Item | None = None

    def bodies(self) -> list[dict[str, Any]]:
        """Returns all items."""
        return [item.body() for item in self._items]

    def add(self, delta: AnswerDelta, positions: Positions) -> Iterator[Event]:
        """Yields the events of an addition of one kind; `positions` are the log-probabilities of
        its tokens, told of text alone."""
        if delta.reasoning:
            if not isinstance(self._open, _Reasoning):
                number = len(self._items)
                yield from self._opened(_Reasoning(self._key, number, self._packs_reasoning))
            assert self._open is not None
            yield from self._open.add(delta.reasoning)
        if delta.content:
            yield from self._text(delta.content, positions)
        for call in delta.calls:
            if call.name:
                yield from self._opened(_Call(self._key, len(self._items), call))
            if call.arguments:
                assert isinstance(self._open, _Call), "a call has a name first"
                yield from self._open.add(call.arguments)

    def _text(self, text: str, positions: Positions) -> Iterator[Event]:
        if not isinstance(self._open, _Message):
            yield from self._opened(_Message(self._key, len(self._items), self._logprobs))
        assert isinstance(self._open, _Message)
        yield from self._open.add_with(text, positions)

    def _opened(self, item: _Item) -> Iterator[Event]:
        yield from self._closed(COMPLETED)
        self._items.append(item)
        self._open = item
        yield from item.opened()

    def _closed(self, status: str) -> Iterator[Event]:
        if self._open is not None:
            item, self._open = self._open, None
            yield from item.closed(status)

    def finish(self, status: str) -> Iterator[Event]:
        """Yields the events of the end. An answer that ended by itself has a text or a call, if
        only an empty text."""
        says_something = any(isinstance(item, _Message | _Call) for item in self._items)
        if status == COMPLETED and not says_something:
            yield from self._opened(_Message(self._key, len(self._items), self._logprobs))
        yield from self._closed(status)
