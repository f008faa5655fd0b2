"""From the messages and blocks of Anthropic's API to the messages of a chat.

Called by `protocol.messages`. A translation: what comes out is read as every chat's messages are.
Errors name the block as the client sent it.

    user        text            ->  user
                tool_result     ->  tool, where it stands
    assistant   text, thinking, tool_use
                                ->  assistant with content, reasoning, tool_calls
    system      text            ->  system, where it stands
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import RequestError, shown
from octavo.server.protocol.signatures import BrokenSignatureError, signed_text

BILLING_HEADER = "x-anthropic-billing-header"
"""How a line begins that one client sends before the system's text. It has another hash each time:
the model learns nothing by it, and no prefix would ever be found again."""
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
ROLES = tuple(_BLOCKS)
_MESSAGE_FIELDS = frozenset(
    {"role", "content", "id", "type", "model", "stop_reason", "stop_sequence", "stop_details"}
    | {"usage", "container", "diagnostics"}
)
"""Answers carry more than role and content; they may be sent back as they are."""
_LONGEST_NAME = 64


def system_text(system: str | list[Any]) -> str:
    """Returns the system's text, its blocks in lines of their own. Raises RequestError."""
    if isinstance(system, str):
        system = [{"type": "text", "text": system}]
    texts = [_text(block, f"system[{i}]", ("text",)) for i, block in enumerate(system)]
    return "\n".join(filter(None, map(_without_billing, texts)))


def _without_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(BILLING_HEADER) else text


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages of a chat. Raises RequestError naming the message and the block.

    Messages of one role that follow each other are one, as in Anthropic's API; but those of the
    system.
    """
    chat: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        role, blocks = _role(message, where), _blocks(message, where)
        if role == "assistant":
            _add_assistant(chat, blocks)
        elif role == "system":
            text = "\n".join(_text(block, spot, _BLOCKS[role]) for spot, block in blocks)
            chat.append({"role": "system", "content": text})
        else:
            _add_user(chat, blocks)
    return chat


def _role(message: dict[str, Any], where: str) -> str:
    for name in message:
        if name not in _MESSAGE_FIELDS and message[name] is not None:
            place = f"{where}.{name[:_LONGEST_NAME]}"
            reason = f"{place} is an unknown field; use role and content"
            raise RequestError(reason, param=place, code="unknown_field")
    role = message.get("role")
    if not isinstance(role, str) or role not in _BLOCKS:
        reason = f"{where}.role must be one of {', '.join(ROLES)}, got {shown(role)}"
        raise RequestError(reason, param=f"{where}.role")
    return role


def _blocks(message: dict[str, Any], where: str) -> list[tuple[str, Any]]:
    """Returns the blocks of a message, each with its place."""
    content = message.get("content")
    place = f"{where}.content"
    if isinstance(content, str):
        return [(place, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise RequestError(f"{place} must be a string or a list of blocks", param=place)
    return [(f"{place}[{i}]", block) for i, block in enumerate(content)]


def _kind(block: Any, where: str, allowed: tuple[str, ...]) -> str:
    if not isinstance(block, Mapping):
        raise RequestError(f"{where} must be an object with a type", param=where)
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in allowed:
        reason = f"{where}: a block of type {shown(kind)} is not supported here; only "
        reason += " and ".join((", ".join(allowed[:-1]), allowed[-1]) if allowed[1:] else allowed)
        raise RequestError(reason, param=where, code="unsupported_content_part")
    return kind


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        place = f"{where}.{name}"
        raise RequestError(f"{place} must be a string, got {shown(value)}", param=place)
    return value


def _text(block: Any, where: str, allowed: tuple[str, ...]) -> str:
    _kind(block, where, allowed)
    return _string(block, "text", where)


def _add_user(chat: list[dict[str, Any]], blocks: list[tuple[str, Any]]) -> None:
    for where, block in blocks or [("", {"type": "text", "text": ""})]:
        if _kind(block, where, _BLOCKS["user"]) == "tool_result":
            called = _string(block, "tool_use_id", where)
            content = _result(block, where)
            chat.append({"role": "tool", "tool_call_id": called, "content": content})
        elif chat and chat[-1]["role"] == "user":
            chat[-1]["content"] += "\n" + _string(block, "text", where)
        else:
            chat.append({"role": "user", "content": _string(block, "text", where)})


def _result(block: Mapping[str, Any], where: str) -> str:
    """Returns what a tool gave; what failed says so."""
    content, place = block.get("content"), f"{where}.content"
    if isinstance(content, list):
        content = "\n".join(_result_text(one, f"{place}[{i}]") for i, one in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise RequestError(f"{place} must be a string or a list of text blocks", param=place)
    is_error = block.get("is_error")
    if is_error is not None and not isinstance(is_error, bool):
        place = f"{where}.is_error"
        raise RequestError(f"{place} must be true or false, got {shown(is_error)}", param=place)
    return f"Error: {content or ''}" if is_error else content or ""


def _result_text(block: Any, where: str) -> str:
    """Returns a block of a result; a tool that was found stands in the prompt already."""
    if _kind(block, where, ("text", "tool_reference")) == "tool_reference":
        return _string(block, "tool_name", where)
    return _string(block, "text", where)


def _add_assistant(chat: list[dict[str, Any]], blocks: list[tuple[str, Any]]) -> None:
    if not (chat and chat[-1]["role"] == "assistant"):
        chat.append({"role": "assistant", "content": ""})
    message = chat[-1]
    for where, block in blocks:
        kind = _kind(block, where, _BLOCKS["assistant"])
        if kind == "text":
            message["content"] += _string(block, "text", where)
        elif kind == "thinking":
            if reasoning := _thinking(block, where):
                message["reasoning"] = message.get("reasoning", "") + reasoning
        elif kind == "tool_use":
            message.setdefault("tool_calls", []).append(_call(block, where))
        else:
            # Only the model's own maker could read it.
            _string(block, "data", where)


def _thinking(block: Mapping[str, Any], where: str) -> str:
    """Returns the reasoning that a block stands for, empty if it is another model's."""
    thinking, signature = _string(block, "thinking", where), block.get("signature", "")
    place = f"{where}.signature"
    if not isinstance(signature, str):
        raise RequestError(f"{place} must be a string, got {shown(signature)}", param=place)
    try:
        return signed_text(thinking, signature) or ""
    except BrokenSignatureError as error:
        message = f"{place}: {error}; send thinking blocks back as they came, or leave them out"
        raise RequestError(message, param=place, code="invalid_signature") from error


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, Mapping):
        place = f"{where}.input"
        raise RequestError(f"{place} must be an object, got {shown(given)}", param=place)
    function = {"name": _string(block, "name", where), "arguments": given}
    return {"id": _string(block, "id", where), "type": "function", "function": function}
