"""Owns how calls and results of tools are read that stand in a chat's history.

Called by `messages`. Templates get what they expect: arguments as a mapping, which also stands for
its own text, so that a model's words come back to it as it wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import RequestError, shown
from octavo.tools.definitions import CUSTOM_INPUT

MAX_CALLS = 1024
"""Of one message."""


class CallArguments(dict[str, Any]):
    """The arguments of a past call, for templates: a mapping for those that look into it, and its
    text as it was sent for those that write it out."""

    __slots__ = ("text",)

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: Any) -> str:
        return self.text + other

    def __radd__(self, other: Any) -> str:
        return other + self.text


def read_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Returns the calls of an assistant's message. Raises RequestError naming the field."""
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise RequestError(f"{where} must be a list, got {type(calls).__name__}", param=where)
    if len(calls) > MAX_CALLS:
        message = f"{where} has {len(calls)} calls; at most {MAX_CALLS} are taken"
        raise RequestError(message, param=where)
    return [_call(call, f"{where}[{place}]") for place, call in enumerate(calls)]


def _call(call: object, where: str) -> dict[str, Any]:
    kind = call.get("type", "function") if isinstance(call, Mapping) else None
    inner = call.get(kind) if isinstance(call, Mapping) and isinstance(kind, str) else None
    if not isinstance(call, Mapping) or kind not in ("function", "custom"):
        raise RequestError(f"{where} must be an object of type function or custom", param=where)
    place = f"{where}.{kind}"
    if not isinstance(inner, Mapping):
        message = f"{place} must be an object with name and arguments"
        raise RequestError(message, param=place)
    name = _text(inner.get("name"), f"{place}.name")
    if kind == "custom":
        given = _text(inner.get("input"), f"{place}.input")
        arguments = arguments_of({CUSTOM_INPUT: given}, f"{place}.input")
    else:
        arguments = arguments_of(inner.get("arguments"), f"{place}.arguments")
    found: dict[str, Any] = {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    if call.get("id") is not None:
        found = {"id": _text(call["id"], f"{where}.id"), **found}
    return found


def arguments_of(given: object, where: str) -> CallArguments | str:
    """Returns arguments for a template; what spells no JSON object stays the text that it is."""
    if isinstance(given, Mapping):
        return CallArguments(given, json.dumps(given, ensure_ascii=False))
    text = "" if given is None else _text(given, where)
    if not text.strip():
        return CallArguments({}, "{}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return CallArguments(value, text) if isinstance(value, dict) else text


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a string, got {shown(value)}", param=where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = f"{where} has half a surrogate pair; send valid Unicode"
        raise RequestError(message, param=where) from error
    return value
