"""Owns how messages of a chat are read: roles, text parts, fields that hold nothing.

Called by the server and by LLM, which so take the same messages and refuse the same ones. Never
renders them: that is the chat template's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from octavo.engine.tool_messages import read_calls
from octavo.errors import RequestError, shown

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""What a message may call its role, and what a template knows it as."""
_MESSAGE_FIELDS = {"role", "content", "name"}
_REASONING_FIELDS = {"reasoning", "reasoning_content"}
"""Of an assistant's message: handed to the template, which may drop it."""
_EMPTY_FIELDS = {
    "function_call": "send tool_calls, and results with the role tool",
    "tool_calls": "only an assistant's message has calls",
    "tool_call_id": "only a message with the role tool has it",
    **dict.fromkeys(("refusal", "annotations"), "leave it out"),
    "audio": "the model reads and writes text only",
}
"""Fields that answers of the API carry; they may be sent back as long as they hold nothing. Why not
else."""
_IGNORED_FIELDS = {
    *("id", "object", "type", "created", "model", "index", "status", "timestamp", "metadata"),
    *("finish_reason", "stop_reason", "logprobs", "token_ids", "usage", "cache_control"),
    *("reasoning_details", "thinking_blocks", "provider_specific_fields"),
}
"""Fields that answers of this and other servers carry; they say nothing to the model."""
_FIELDS_OF = {"assistant": "tool_calls", "tool": "tool_call_id"}
"""What messages of a role have that others have not."""
_LONGEST_NAME = 64
_TEXT_PARTS = {"text", "input_text", "output_text"}


def read_messages(messages: object, where: str = "messages") -> list[dict[str, Any]]:
    """Returns the messages: their content as text, an assistant's with the `tool_calls` that it
    has, a tool's with the name of the tool if one of the calls before has its id.

    Raises RequestError naming the message and the field.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        reason = f"{where} must be a list of messages, got {type(messages).__name__}"
        raise RequestError(reason, param=where)
    read = [_as_text(message, f"{where}[{i}]") for i, message in enumerate(messages)]
    names: dict[str, str] = {}
    for message in read:
        for call in message.get("tool_calls", ()):
            names[call.get("id", "")] = call["function"]["name"]
        called = message.get("tool_call_id")
        if called in names:
            message.setdefault("name", names[called])
    return read


def is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates: JSON can spell them, tokenizers cannot take them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_text(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        reason = f"{where} must be a mapping with role and content, got {type(message).__name__}"
        raise RequestError(reason, param=where)
    _check_fields(message, where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        reason = f"{where}.role must be one of {', '.join(ROLES)}, got {shown(role)}"
        raise RequestError(reason, param=f"{where}.role")
    content = _content(message, f"{where}.content", role)
    result: dict[str, Any] = {"role": ROLES[role], "content": content}
    name = message.get("name")
    if name is not None:
        result["name"] = _checked_text(name, f"{where}.name", "a string")
    if role == "assistant" and (reasoning := _reasoning(message, where)):
        # Templates know it by either name.
        result |= dict.fromkeys(sorted(_REASONING_FIELDS), reasoning)
    if role == "assistant" and message.get("tool_calls"):
        result["tool_calls"] = read_calls(message["tool_calls"], f"{where}.tool_calls")
    if role == "tool" and message.get("tool_call_id") is not None:
        place = f"{where}.tool_call_id"
        result["tool_call_id"] = _checked_text(message["tool_call_id"], place, "a string")
    return result


def _check_fields(message: Mapping[Any, Any], where: str) -> None:
    for name, value in message.items():
        if value is None or name in _MESSAGE_FIELDS | _REASONING_FIELDS | _IGNORED_FIELDS:
            continue
        if name == _FIELDS_OF.get(str(message.get("role"))):
            continue
        place = f"{where}.{str(name)[:_LONGEST_NAME]}"
        if name not in _EMPTY_FIELDS:
            reason = f"{place} is an unknown field; use role, content, name"
            raise RequestError(reason, param=place, code="unknown_field")
        if value not in ([], ""):
            reason = f"{place} is not supported: {_EMPTY_FIELDS[name]}"
            raise RequestError(reason, param=place, code="unsupported_field")


def _reasoning(message: Mapping[Any, Any], where: str) -> str:
    for name in sorted(_REASONING_FIELDS):
        if message.get(name) is not None:
            return _checked_text(message[name], f"{where}.{name}", "a string")
    return ""


def _content(message: Mapping[Any, Any], where: str, role: str) -> str:
    content = message.get("content")
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list | tuple):
        return _checked_text(content, where, "a string or a list of text parts")
    return "".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str) or kind not in _TEXT_PARTS:
        reason = f"{where}: a content part of type {shown(kind)} is not supported; only 'text' is"
        raise RequestError(reason, param=where, code="unsupported_content_part")
    return _checked_text(part.get("text"), f"{where}.text", "a string")


def _checked_text(value: object, where: str, wanted: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be {wanted}", param=where)
    if not is_unicode(value):
        raise RequestError(f"{where} has half a surrogate pair; send valid Unicode", param=where)
    return value


def conversations(messages: Any) -> list[tuple[str, Any]]:
    """Returns each conversation and where it stands in what was given."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        return [("messages", messages)]
    listed = list(messages)
    if not listed or isinstance(listed[0], Mapping):
        return [("messages", listed)]
    return [(f"messages[{place}]", chat) for place, chat in enumerate(listed)]
