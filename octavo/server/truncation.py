"""`truncation: auto`: a conversation that is too long for the context, without its oldest items.

Called by `routes.responses` once a prompt did not fit. What is left out is chosen in steps of an
eighth of the context, so that the prompts of a growing conversation begin alike for many turns and
find their prefix in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from octavo.errors import ContextLengthError
from octavo.server.body import parsed
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.state import ServerState
from octavo.server.tokenising import render

_CHARS_PER_TOKEN = 4
"""Of ordinary text: only the size of steps depends on it."""
_SYSTEM = ("system", "developer")


class Head(msgspec.Struct, frozen=True):
    """What of an item tells where a conversation may be cut."""

    type: Any = None
    role: Any = None
    call_id: Any = None


async def fitted(state: ServerState, body: ResponsesRequest) -> ResponsesRequest | None:
    """Returns the request without as many of its oldest items as make room for the answer: for
    `max_output_tokens`, but no more than a quarter of the context. None: even the newest turn is
    too long. Raises RequestError, OverloadedError."""
    context = state.engine.max_model_len
    limit = context - min(body.max_output_tokens or context, context // 4)
    items = msgspec.json.decode(body.items_json, type=list[msgspec.Raw])
    heads = msgspec.json.decode(body.items_json, type=list[Head])
    sizes = [len(bytes(one)) for one in items]
    ways = _in_steps(list(shorter(heads)), sizes, context * _CHARS_PER_TOKEN // 8)
    found, low, high = None, 0, len(ways)
    while low < high:
        middle = (low + high) // 2
        content = body.with_input([items[place] for place in ways[middle]])
        one = await parsed(state, content, ResponsesRequest)
        if await _num_tokens(state, one) <= limit:
            found, high = one, middle
        else:
            low = middle + 1
    return found


def shorter(heads: Sequence[Head]) -> Iterator[list[int]]:
    """Yields the places of the items that are kept, never more than before.

    System messages before all else stay. The rest begins with a message of the user, or with a turn
    of the assistant behind the user's last words before it; a call and its result stay together.
    """
    num_first = next((n for n, one in enumerate(heads) if one.role not in _SYSTEM), len(heads))
    first = list(range(num_first))
    asked: list[int] = []
    """Where the user's last words are."""
    is_open: set[Any] = set()
    for place in range(num_first, len(heads)):
        one, rest = heads[place], list(range(place, len(heads)))
        is_asking = one.role == "user"
        if place > num_first and not is_open and (is_asking or _begins_turn(heads, place)):
            yield first + ([] if is_asking else asked) + rest
        if is_asking:
            asked = [*asked, place] if heads[place - 1].role == "user" else [place]
        elif _is_output(one):
            is_open.discard(one.call_id)
        elif one.call_id is not None:
            is_open.add(one.call_id)


def _begins_turn(heads: Sequence[Head], place: int) -> bool:
    """Whether the assistant speaks again, after results."""
    one, before = heads[place], heads[place - 1]
    is_assistant = one.role in (None, "assistant") and not _is_output(one)
    return is_assistant and (_is_output(before) or before.role in _SYSTEM)


def _is_output(head: Head) -> bool:
    return isinstance(head.type, str) and head.type.endswith("_output")


def _in_steps(ways: list[list[int]], sizes: Sequence[int], step: int) -> list[list[int]]:
    """Returns the first way of each step of what is left out, and the last of all."""
    total = sum(sizes)
    numbers = [(total - sum(sizes[place] for place in way)) // step for way in ways]
    return [
        way
        for place, way in enumerate(ways)
        if place == len(ways) - 1 or numbers[place] > (numbers[place - 1] if place else 0)
    ]


async def _num_tokens(state: ServerState, body: ResponsesRequest) -> int:
    """Returns the length of a prompt; one that cannot fit is not tokenised."""
    try:
        rendered = body.chat.rendered or render(state.engine.tokenizer, body.chat)
        return len(await state.tokenising.encode_rendered(rendered))
    except ContextLengthError:
        return state.engine.max_model_len + 1
