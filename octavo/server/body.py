"""A request's body: received within bounds, and parsed into its model.

Called by the routes that take a body. Never interprets a field: that is `protocol`'s.
"""

from __future__ import annotations

from typing import TypeVar

from starlette.requests import Request

from octavo.server.errors import ApiError, ClientDisconnectedError
from octavo.server.exchange import Exchange
from octavo.server.guards.inputs import checked_prompts
from octavo.server.headers import header
from octavo.server.limits import BodyRoom
from octavo.server.protocol.decoding import decode
from octavo.server.protocol.parsing import parse
from octavo.server.protocol.strict import StrictModel
from octavo.server.state import ServerState, server_state

Body = TypeVar("Body", bound=StrictModel)


async def read_body(request: Request, model: type[Body]) -> Body:
    """Returns the request's body as a `model`. Raises ApiError, RequestError, OverloadedError, and
    ClientDisconnectedError."""
    require_json(request)
    state = server_state(request)
    room, received = state.body_room, bytearray()
    try:
        await _receive(request, room, received)
        content = bytes(received)
        _note(request, content)
        await state.beginnings.wait()
        body = await parsed(state, content, model)
    finally:
        room.give_back(len(received))
    request.scope["state"]["body"] = body  # Errors ask it for the names of its fields.
    return body if state.guard is None else await checked_prompts(request, body, state.guard)


def _note(request: Request, content: bytes) -> None:
    exchange: Exchange = request.scope["state"]["exchange"]
    exchange.num_body_bytes = len(content)
    if exchange.sent is not None:
        exchange.sent = content.decode("utf-8", "backslashreplace")


async def parsed(state: ServerState, content: bytes, model: type[Body]) -> Body:
    """Returns `content` as a `model`, without holding the event loop. Raises RequestError,
    OverloadedError."""
    if is_quick(content, model):
        return parse(model, decode(content))
    return await state.parser.parse(model, content)


def require_json(request: Request) -> None:
    """Raises ApiError (400) unless the request says that its body is JSON.

    A form of another site, which a browser sends without asking, cannot say so.
    """
    content_type = header(request.scope, b"content-type").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        message = "the body was not read as JSON; send Content-Type: application/json"
        raise ApiError(400, message, code="not_json")


async def _receive(request: Request, room: BodyRoom, content: bytearray) -> None:
    """Fills `content`, all of which has taken its room."""
    length = header(request.scope, b"content-length")
    if length.isdecimal():
        room.check(int(length[:20]))
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError("the client left before its request was complete")
        piece = message.get("body", b"")
        room.check(len(content) + len(piece))
        room.take(len(piece))
        content += piece
        more = message.get("more_body", False)


def is_quick(content: bytes, model: type[StrictModel]) -> bool:
    """Whether parsing `content` holds the event loop for a few milliseconds at most.

    A text costs next to nothing for its length, each value of a list or an object about a
    microsecond: there are at most as many as commas and opening brackets.
    """
    if len(content) > model.max_quick_bytes:
        return False
    if len(content) <= model.max_quick_values:
        return True
    num_values = content.count(b",") + content.count(b"[") + content.count(b"{")
    return num_values <= model.max_quick_values
