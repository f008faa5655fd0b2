"""From the items of the Responses API to the messages of a chat.

Called by `protocol.responses`; what a message may hold is `engine.messages`' to say. An assistant's
turn is several items there and one message here: reasoning, text, calls.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo.errors import RequestError, shown

Item = Mapping[str, Any]
Message = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
ITEM_TYPES = (
    *("message", "reasoning", "function_call", "function_call_output"),
    *("custom_tool_call", "custom_tool_call_output"),
)
REFERENCE = "item_reference"
_OUTPUT_ID = re.compile(r"(?:msg|rs|fc|ctc)_([0-9a-f]{32})_[0-9]+")
"""Ids of items that a response told: they name the response, and so the turn."""
_PACKED = "octavo1."
"""What begins an `encrypted_content` of ours."""
_TURN = "_turn"


@dataclass(slots=True)
class ChatHistory:
    """The messages, and where each came from. Of items that are named by their ids nothing is
    there: those must be put in their place before."""

    messages: list[Message] = field(default_factory=list)
    places: list[tuple[str, str]] = field(default_factory=list)
    """Of each message: its item, and the item's field that became its content."""

    def renamed(self, text: str) -> str:
        """Returns `text` with the places of items in place of those of messages."""

        def place(found: re.Match[str]) -> str:
            number = int(found[1])
            item, content = self.places[number] if number < len(self.places) else ("input", "")
            return item + (f".{content}" if found[2] else "")

        return re.sub(r"messages\[(\d+)\](\.content\b)?", place, text)


def output_id(kind: str, response_key: str, number: int) -> str:
    """Returns the id of a response's item; `kind` is msg, rs, fc or ctc, `response_key` 32 digits
    of its id."""
    return f"{kind}_{response_key}_{number}"


def is_response_id(text: str) -> bool:
    """Whether `text` has the form of a response's id."""
    return re.fullmatch(r"resp_[0-9a-f]{32}", text) is not None


def response_of_item(item_id: str) -> str | None:
    """Returns the id of the response that told an item; None if it is none of ours."""
    found = _OUTPUT_ID.fullmatch(item_id)
    return f"resp_{found[1]}" if found else None


def reference_of(item: Any) -> str | None:
    """Returns the id of the item that `item` stands for; None if it is one itself."""
    if not isinstance(item, Mapping):
        return None
    is_bare = item.keys() <= {"id", "type"} and item.get("type") is None
    if item.get("type") != REFERENCE and not is_bare:
        return None
    found = item.get("id")
    return found if isinstance(found, str) else None


def raw_reference(item: msgspec.Raw) -> str | None:
    """Returns the same of an item that is not decoded yet."""
    # Most items are not looked into: they are long, references are short.
    return reference_of(msgspec.json.decode(item)) if len(bytes(item)) < 512 else None


def packed_reasoning(text: str) -> str:
    """Returns a reasoning as `encrypted_content`: for clients that send nothing else back. It is
    no secret, since the same item has it as text."""
    return _PACKED + base64.b64encode(text.encode()).decode()


def chat_history(given: str | Sequence[Any], instructions: str | None) -> ChatHistory:
    """Returns the messages that an input comes to, behind those of `instructions`.

    Raises RequestError naming the item and the field.
    """
    reader = _Reader()
    if instructions:
        reader.add({"role": "system", "content": instructions}, "instructions")
    if isinstance(given, str):
        reader.add({"role": "user", "content": given}, "input", "")
    else:
        for place, item in enumerate(given):
            reader.read(item, f"input[{place}]")
    for message in reader.history.messages:
        message.pop(_TURN, None)
    return reader.history


class _Reader:
    """Reads items one after the other."""

    def __init__(self) -> None:
        self.history = ChatHistory()
        self._turn: Message | None = None
        """The assistant's message that further items of its turn are added to."""
        self._readers: dict[str, Callable[[Item, str], None]] = {
            "message": self._message,
            "reasoning": self._reasoning,
            "function_call": self._call,
            "custom_tool_call": self._call,
            "function_call_output": self._output,
            "custom_tool_call_output": self._output,
        }

    def read(self, item: Any, where: str) -> None:
        if not isinstance(item, Mapping):
            raise RequestError(f"{where} must be an object", param=where)
        if reference_of(item) is not None:
            return
        kind = item.get("type")
        if kind is None and "role" in item:
            kind = "message"
        reader = self._readers.get(kind) if isinstance(kind, str) else None
        if reader is None:
            reason = (
                f"{where}.type {shown(kind)} is not supported: the server has no tools of its own; "
                f"items are {', '.join(ITEM_TYPES)}"
            )
            raise RequestError(reason, param=f"{where}.type", code="unsupported_item")
        reader(item, where)

    def add(self, message: Message, where: str, content: str = "content") -> None:
        self.history.messages.append(message)
        self.history.places.append((where, content))
        self._turn = message if message["role"] == "assistant" else None

    def _message(self, item: Item, where: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            reason = f"{where}.role must be one of {', '.join(ROLES)}, got {shown(role)}"
            raise RequestError(reason, param=f"{where}.role")
        message = {name: value for name, value in item.items() if name not in ("type", "phase")}
        if role != "assistant":
            self.add(message, where)
            return
        turn = self._turn_of_words(item)
        if turn is None:
            self.add({**message, _TURN: _key(item)}, where)
        else:
            turn["content"] = [*_parts(turn.get("content")), *_parts(message.get("content"))]

    def _reasoning(self, item: Item, where: str) -> None:
        text = _reasoning_text(item, where)
        turn = self._turn_of_words(item)
        if turn is None:
            turn = {"role": "assistant", "content": "", "reasoning": text, _TURN: _key(item)}
            self.add(turn, where)
        else:
            turn["reasoning"] = turn.get("reasoning", "") + text

    def _call(self, item: Item, where: str) -> None:
        call_id, name = _text(item, "call_id", where), _text(item, "name", where)
        if item["type"] == "function_call":
            kind, inner = "function", {"arguments": _text(item, "arguments", where)}
        else:
            kind, inner = "custom", {"input": _text(item, "input", where)}
        call: dict[str, Any] = {"id": call_id, "type": kind, kind: {"name": name, **inner}}
        turn = self._own_turn(item) or self._turn_before_results(item)
        if turn is None:
            turn = Message(role="assistant", content="", **{_TURN: _key(item)})
            self.add(turn, where)
        turn.setdefault("tool_calls", []).append(call)

    def _output(self, item: Item, where: str) -> None:
        call_id = _text(item, "call_id", where)
        message = {"role": "tool", "tool_call_id": call_id, "content": item.get("output")}
        self.add(message, where, "output")

    def _own_turn(self, item: Item) -> Message | None:
        """Returns the message that `item` may be added to: not one of another response."""
        turn, key = self._turn, _key(item)
        if turn is None or (key and turn.get(_TURN) and key != turn[_TURN]):
            return None
        return turn

    def _turn_of_words(self, item: Item) -> Message | None:
        """The same for text and reasoning: two texts are two messages, unless they are of one
        answer, as they are where it calls and the results are still to come."""
        turn, key = self._own_turn(item), _key(item)
        if turn is None or turn.get("tool_calls") or (key and key == turn.get(_TURN)):
            return turn
        return None if turn.get("content") else turn

    def _turn_before_results(self, item: Item) -> Message | None:
        """Returns the message of the response that told a call, if nothing but results has come
        since: some clients send each call's result right behind it."""
        key = _key(item)
        for message in reversed(self.history.messages):
            if message["role"] != "tool":
                return message if key and message.get(_TURN) == key else None
        return None


def _key(item: Item) -> str:
    """Returns what items of one response have in common; "" where that is not known."""
    item_id = item.get("id")
    found = _OUTPUT_ID.fullmatch(item_id) if isinstance(item_id, str) else None
    return found[1] if found else ""


def _parts(content: Any) -> list[Any]:
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content) if isinstance(content, list) else [content]


def _text(item: Item, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        reason = f"{where}.{name} must be a string, got {shown(value)}"
        raise RequestError(reason, param=f"{where}.{name}")
    return value


def _reasoning_text(item: Item, where: str) -> str:
    """Returns a reasoning: its content, else what we packed, else its summary."""
    if content := _joined(item, "content", "reasoning_text", where):
        return content
    packed = item.get("encrypted_content")
    if packed is not None and not isinstance(packed, str):
        place = f"{where}.encrypted_content"
        raise RequestError(f"{place} must be a string", param=place)
    if packed and packed.startswith(_PACKED):
        try:
            return base64.b64decode(packed.removeprefix(_PACKED), validate=True).decode()
        except (binascii.Error, ValueError) as error:
            place = f"{where}.encrypted_content"
            reason = f"{place} is not as the server wrote it; send it unchanged, or leave it out"
            raise RequestError(reason, param=place) from error
    return _joined(item, "summary", "summary_text", where)


def _joined(item: Item, name: str, kind: str, where: str) -> str:
    place, parts = f"{where}.{name}", item.get(name) or []
    if not isinstance(parts, list):
        raise RequestError(f"{place} must be a list", param=place)
    for number, part in enumerate(parts):
        is_known = isinstance(part, Mapping) and part.get("type") in (kind, "text")
        if not is_known or not isinstance(part.get("text"), str):
            reason = f"{place}[{number}] must be an object of type {kind} with a text"
            raise RequestError(reason, param=f"{place}[{number}]")
    return "".join(part["text"] for part in parts)


_KINDS = {"reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}


def listed_items(items: Sequence[Any], response_key: str) -> list[dict[str, Any]]:
    """Returns the input items of a response as lists of them have them: each with an id."""
    return [_listed(item, response_key, place) for place, item in enumerate(items)]


def _listed(item: dict[str, Any], response_key: str, place: int) -> dict[str, Any]:
    kind = item.get("type") or ("message" if "role" in item else REFERENCE)
    made = f"{_KINDS.get(kind, 'msg')}_{response_key}_in_{place}"
    item = {"status": "completed", **item, "type": kind, "id": item.get("id") or made}
    if kind == "message":
        is_answer = item["role"] == "assistant"
        content = [
            {**part, "type": "output_text", "annotations": []}
            if is_answer
            else {**part, "type": "input_text"}
            for part in _parts(item.get("content"))
        ]
        item["content"] = content
    elif kind == "reasoning":
        item.setdefault("summary", [])
    return item


def chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Returns a tool as chats have it: what describes it stands one level deeper."""
    kind = tool.get("type")
    if kind not in ("function", "custom"):
        return tool  # which is refused by its type
    return {"type": kind, kind: {name: one for name, one in tool.items() if name != "type"}}
