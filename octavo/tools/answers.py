"""Owns a sequence's answer as clients get it: text, reasoning and calls, whole or in deltas.

Made by both faces around an `AnswerParser`; adds what the request asked for: custom tools have an
input and no arguments, one call alone where parallel ones are not wanted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.errors import RequestError
from octavo.tools.answer_parser import AnswerFormat, AnswerParser
from octavo.tools.calls import CallPiece, Piece, TextPiece
from octavo.tools.definitions import CUSTOM_INPUT, Kind, Tools
from octavo.tools.marks import Marks
from octavo.tools.reasoning_tokens import NO_THOUGHT, Thought

INPUTS: dict[Kind, str] = {"function": "arguments", "custom": "input"}
"""What a call of each kind gives its tool."""

_CUT = frozenset({"length", "content_filter"})
"""Why a sequence ended that had more to say."""


@dataclass(slots=True, kw_only=True)
class CallDelta:
    """What was added to one call; name and id come once."""

    number: int
    kind: Kind = "function"
    id: str = ""
    name: str = ""
    arguments: str = ""
    """JSON of a function; the input of a custom tool."""

    def function(self) -> dict[str, str]:
        """Returns what is called and with what, as messages have it."""
        return {"name": self.name, INPUTS[self.kind]: self.arguments}


@dataclass(slots=True, kw_only=True)
class AnswerDelta:
    """What was added to one answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class AnswerSum:
    """Adds up the deltas of one answer."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[CallDelta] = []
        self._arguments: list[list[str]] = []

    def add(self, delta: AnswerDelta) -> None:
        self._content.append(delta.content)
        self._reasoning.append(delta.reasoning)
        for call in delta.calls:
            if call.name:
                self._calls.append(call)
                self._arguments.append([])
            self._arguments[-1].append(call.arguments)

    def total(self) -> AnswerDelta:
        """Returns the deltas as one."""
        calls = [
            replace(call, arguments="".join(parts))
            for call, parts in zip(self._calls, self._arguments, strict=True)
        ]
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        return AnswerDelta(content=content, reasoning=reasoning, calls=calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerReading:
    """How the answers to one request are read."""

    format: AnswerFormat
    tools: Tools
    starts_inside: bool
    """Whether the prompt has begun the reasoning."""
    shows_reasoning: bool = True
    thought: Thought = NO_THOUGHT
    """The reasoning that stands before the answer, or may stand there: what the answer is held to
    begins behind it."""

    @property
    def marks(self) -> Marks:
        return self.format.marks

    def begin(self) -> AnswerReader:
        """Returns the reader of one sequence."""
        return AnswerReader(self)


def within_budget(reading: AnswerReading | None, budget: int | None) -> AnswerReading | None:
    """Returns the reading with at most `budget` tokens of reasoning, where one is given.

    Raises RequestError if the budget is negative or the reasoning cannot be ended."""
    if budget is None:
        return reading
    if budget < 0:
        message = f"thinking_token_budget {budget}: must be at least 0"
        raise RequestError(message, param="thinking_token_budget")
    if reading is None or not reading.thought.ends:
        message = (
            "thinking_token_budget: the model does not reason, or no single token ends its "
            "reasoning; leave it out"
        )
        raise RequestError(message, param="thinking_token_budget")
    return replace(reading, thought=replace(reading.thought, budget=budget))


def reading_of(
    found: AnswerFormat | None,
    tools: Tools,
    prompt: str,
    *,
    tells_reasoning: bool = True,
    shows_reasoning: bool = True,
) -> AnswerReading | None:
    """Returns how the answers to `prompt`, the text of a chat, are read; None if they are plain.

    Without `tells_reasoning` it stays in the content, without `shows_reasoning` it is left out.
    """
    if found is None:
        return None
    thought = found.thought_before(prompt)
    if not tells_reasoning:
        found = found.without_reasoning()
    if found.reasoning is None and not tools.are_called and not found.is_in_channels:
        return None
    return AnswerReading(
        format=found,
        tools=tools,
        starts_inside=found.starts_inside(prompt),
        shows_reasoning=shows_reasoning,
        thought=thought,
    )


class AnswerReader:
    """One sequence's answer."""

    def __init__(self, reading: AnswerReading) -> None:
        self._reading = reading
        self._parser = AnswerParser(
            reading.format,
            schemas=reading.tools.schemas,
            starts_inside=reading.starts_inside,
        )
        self._custom_names = reading.tools.custom_names
        self._input: list[str] | None = None
        """The arguments so far of the custom tool that is being called."""
        self._number = 0
        """Of the call that was begun last."""
        self._tokens = reading.format.token_counter(reading.starts_inside)

    @property
    def has_calls(self) -> bool:
        return self._parser.num_calls > 0

    @property
    def num_reasoning_tokens(self) -> int:
        return self._tokens.num_tokens

    def push(
        self, text: str, token_ids: Sequence[int] = (), finish_reason: str | None = None
    ) -> AnswerDelta:
        """Returns what `text` adds, and if it is the last all that was held back."""
        delta = AnswerDelta()
        for piece in self._read(text, token_ids, finish_reason):
            self._take(delta, piece)
        if finish_reason is not None:
            self._end_input(delta)
        return delta

    def push_in_order(
        self, text: str, token_ids: Sequence[int] = (), finish_reason: str | None = None
    ) -> Iterator[AnswerDelta]:
        """Yields the same in small deltas, from which the order of text, reasoning and calls can
        be told."""
        for piece in self._read(text, token_ids, finish_reason):
            if isinstance(piece, TextPiece) or piece.name:
                yield self._input_delta()
            delta = AnswerDelta()
            self._take(delta, piece)
            yield delta
        if finish_reason is not None:
            yield self._input_delta()

    def _input_delta(self) -> AnswerDelta:
        """Returns the input of the custom tool that was being called."""
        delta = AnswerDelta()
        self._end_input(delta)
        return delta

    def _read(self, text: str, token_ids: Sequence[int], finish_reason: str | None) -> list[Piece]:
        self._tokens.add(token_ids)
        pieces = self._parser.push(text)
        if finish_reason is not None:
            pieces += self._parser.finish(is_cut=finish_reason in _CUT)
        return pieces

    def _take(self, delta: AnswerDelta, piece: Piece) -> None:
        if isinstance(piece, TextPiece):
            if piece.kind == "content":
                delta.content += piece.text
            elif self._reading.shows_reasoning:
                delta.reasoning += piece.text
            return
        if piece.number and not self._reading.tools.is_parallel:
            return
        if piece.name:
            self._end_input(delta)
            is_custom = piece.name in self._custom_names
            self._input, self._number = ([] if is_custom else None), piece.number
            kind: Kind = "custom" if is_custom else "function"
            delta.calls.append(
                CallDelta(number=piece.number, kind=kind, id=piece.id, name=piece.name)
            )
        if self._input is not None:
            self._input.append(piece.arguments)
        elif piece.arguments:
            self._add(delta, piece)

    def _add(self, delta: AnswerDelta, piece: CallPiece) -> None:
        last = delta.calls[-1] if delta.calls else None
        if last is None or last.number != piece.number:
            delta.calls.append(CallDelta(number=piece.number, arguments=piece.arguments))
        else:
            last.arguments += piece.arguments

    def _end_input(self, delta: AnswerDelta) -> None:
        """Tells the input of a custom tool, which can be read when all of it is there."""
        if self._input is None:
            return
        text, self._input = input_of("".join(self._input)), None
        number = self._number
        last = delta.calls[-1] if delta.calls else None
        if last is None or last.number != number:
            delta.calls.append(CallDelta(number=number, kind="custom", arguments=text))
        else:
            last.arguments += text


def message_of(found: AnswerDelta, before: str = "") -> dict[str, Any]:
    """Returns a whole answer, behind the text `before`, as a message of the assistant."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": before + found.content or (None if found.calls else ""),
        **reasoning_of(found),
    }
    if found.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": call.kind, call.kind: call.function()} for call in found.calls
        ]
    return message


def reasoning_of(found: AnswerDelta) -> dict[str, str]:
    """Returns the reasoning as messages have it: clients know it by either name."""
    names = ("reasoning", "reasoning_content")
    return dict.fromkeys(names, found.reasoning) if found.reasoning else {}


def input_of(arguments: str) -> str:
    """Returns the input of a custom tool from the arguments that a model wrote."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    given = found.get(CUSTOM_INPUT) if isinstance(found, dict) else found
    return given if isinstance(given, str) else arguments
