"""What a request would have the model read, shown to the guard before it is made into tokens.

Called where bodies come in (`body`) and where they have become chats (`chat_calls`); a text of the
client that reaches the model by another way than these is refused by `generation`, which asks for
the CallGuard that is left here.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from octavo.guard import GuardText, Refuse
from octavo.server.errors import ApiError
from octavo.server.guards.call import CallGuard
from octavo.server.guards.gate import Gate, because
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.pooling import InputFields, RerankRequest, ScoreRequest
from octavo.server.protocol.strict import PackedIds, StrictModel
from octavo.server.state import server_state

CONTENT_FILTER = "content_filter"
"""The code of what a guard refuses."""
KEY = "guard"
"""Of the CallGuard in the state of a request."""
_PROMPTS: dict[type[StrictModel], tuple[str, ...]] = {
    CompletionRequest: ("prompt",),
    InputFields: ("input",),
    ScoreRequest: ("text_1", "text_2", "instruction"),
    RerankRequest: ("query", "documents", "instruction"),
}
"""Fields of texts, of bodies that are no chats."""
_CHAT = ("messages", "documents")
_CHAT_JSON = (("tools", "tools"), ("chat_template_kwargs", "template"))
"""Fields that are shown as JSON, with the role that they are given."""
_NAMES = frozenset({"role", "type", "reasoning_content"})
"""What says what a text is, and the other name of a reasoning."""
_IDS = frozenset({"id", "tool_call_id"})
_PLAIN_ID = re.compile(r"[\w.:-]{1,64}")

Body = TypeVar("Body", bound=StrictModel)
_Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Shown:
    """A text of a body, and where it stands there."""

    path: _Path
    text: GuardText


async def checked_prompts(request: Request, body: Body, gate: Gate) -> Body:
    """Returns a body as the guard wants it, if it is one of texts or token ids; chats are to pass
    `checked_chat`. Raises ApiError."""
    names = next((names for kind, names in _PROMPTS.items() if isinstance(body, kind)), ())
    if not names:
        return body
    shown = [one for name in names async for one in _prompts(request, body, name)]
    return await _checked(request, body, gate, shown)


async def checked_chat(request: Request, body: ChatRequest, gate: Gate) -> ChatRequest:
    """Returns a chat as the guard wants it. Raises ApiError."""
    # In a thread, as rendering is: there may be thousands of messages.
    plain, shown = await asyncio.to_thread(_shown_of, body)
    checked = await _checked(request, plain, gate, shown)
    return body if checked is plain else checked


def _shown_of(body: ChatRequest) -> tuple[ChatRequest, list[_Shown]]:
    """Returns a chat as its template gets it, in which a text in parts is one text, as the
    arguments of a call are; and its texts."""
    messages = [_with_texts(message) for message in body.template_messages()]
    plain = body.model_copy(update={"messages": messages})
    shown = [one for name in _CHAT for one in _leaves(getattr(plain, name), (name,), name)]
    for name, role in _CHAT_JSON:
        value = getattr(plain, name)
        if value is not None and any(_leaves(value, (name,), role)):
            text = json.dumps(value, ensure_ascii=False)
            fixed = GuardText(role=role, place=name, text=text, is_fixed=True)
            shown.append(_Shown((name,), fixed))
    return plain, shown


def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {name: str(one) for name, one in call["function"].items()}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


async def _checked(request: Request, body: Body, gate: Gate, shown: Sequence[_Shown]) -> Body:
    guard = request.scope["state"][KEY] = CallGuard.of(request, gate)
    verdict = await guard.input(tuple(one.text for one in shown))
    if verdict is None:
        return body
    if isinstance(verdict, Refuse):
        message = f"this server's guard refused the request{because(verdict)}"
        raise ApiError(400, message, code=CONTENT_FILTER, param=body.field_name(_field(shown)))
    changes: dict[str, Any] = {}
    for one, text in zip(shown, verdict.texts, strict=True):
        if text != one.text.text:
            await _put(request, changes, body, one.path, text)
    return body.model_copy(update=changes)


def _field(shown: Sequence[_Shown]) -> str:
    return str(shown[0].path[0])


async def _put(
    request: Request, changes: dict[str, Any], body: StrictModel, path: _Path, text: str
) -> None:
    """Puts a text in its place, in a copy of the field that has it."""
    name = str(path[0])
    if name not in changes:
        changes[name] = await asyncio.to_thread(copy.deepcopy, getattr(body, name))
    place, value = changes, text
    for part in path[:-1]:
        place = place[part]  # type: ignore[index]
    if isinstance(place[path[-1]], PackedIds):  # type: ignore[index]
        [value] = await server_state(request).tokenising.encode([text], add_special_tokens=False)
    place[path[-1]] = value  # type: ignore[index]


async def _prompts(request: Request, body: StrictModel, name: str) -> AsyncIterator[_Shown]:
    """Yields the texts of a field: a text, token ids, or a list of one of them."""
    value = getattr(body, name)
    is_many = isinstance(value, list)
    for index, one in enumerate(value if is_many else [value]):
        if not one:
            continue
        text = one
        if isinstance(one, PackedIds):
            text = await server_state(request).tokenising.decode(one, skip_special_tokens=False)
        place = f"{name}[{index}]" if is_many else name
        path = (name, index) if is_many else (name,)
        yield _Shown(path, GuardText(role=name, place=place, text=text))


def _leaves(value: object, path: _Path, role: str) -> Iterator[_Shown]:
    """Yields all texts within a value, but names that say what it is."""
    if isinstance(value, str):
        if value:
            yield _Shown(path, GuardText(role=role, place=_place(path), text=value))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _leaves(one, (*path, index), role)
    elif isinstance(value, dict):
        given = value.get("role")
        role = given if isinstance(given, str) else role
        for name, one in value.items():
            is_id = name in _IDS and isinstance(one, str) and _PLAIN_ID.fullmatch(one)
            if name not in _NAMES and not is_id:
                yield from _leaves(one, (*path, name), role)


def _place(path: _Path) -> str:
    first, *rest = path
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    return str(first) + "".join(parts)


def guard_of(request: Request) -> CallGuard | None:
    """Returns the guard that has let a request's texts through, if there is a guard. A request
    that has not passed it is a mistake of ours, and goes no further."""
    return None if server_state(request).guard is None else request.scope["state"][KEY]
