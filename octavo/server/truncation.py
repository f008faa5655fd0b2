"""`truncation: auto`: a conversation that is too long for the context, without its oldest items.

Called by `routes.responses` once a prompt did not fit. What is left out is chosen in steps of an
eighth of the context, so that the prompts of a growing conversation begin alike for many turns and
find their prefix in the cache.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from octavo.errors import ContextLengthError
from octavo.server.body import parsed
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.state import ServerState
from octavo.server.tokenising import render

T = TypeVar("T")

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
    # In threads, for a conversation may have 100,000 items.
    step = context * _CHARS_PER_TOKEN // 8
    items, ways = await asyncio.to_thread(_ways, body.items_json, step)
    found, low, high = None, 0, len(ways)
    while low < high:
        middle = (low + high) // 2
        content = await asyncio.to_thread(lambda way=ways[middle]: body.with_input(way.of(items)))
        one = await parsed(state, content, ResponsesRequest)
        if await _num_tokens(state, one) <= limit:
            found, high = one, middle
        else:
            low = middle + 1
    return found


class Way(NamedTuple):
    """The places of the items that are kept, in three runs: lists of them would take the square of
    a conversation's length."""

    first: range
    asked: range
    rest: range

    def of(self, items: Sequence[T]) -> list[T]:
        return [items[place] for run in self for place in run]


def _ways(items_json: bytes, step: int) -> tuple[list[msgspec.Raw], list[Way]]:
    items = msgspec.json.decode(items_json, type=list[msgspec.Raw])
    heads = msgspec.json.decode(items_json, type=list[Head])
    ends = [0, *itertools.accumulate(len(bytes(one)) for one in items)]
    return items, list(_in_steps(shorter(heads), ends, step))


def shorter(heads: Sequence[Head]) -> Iterator[Way]:
    """Yields what is kept, never more than before.

    System messages before all else stay. The rest begins with a message of the user, or with a turn
    of the assistant behind the user's last words before it; a call and its result stay together.
    """
    num_first = next((n for n, one in enumerate(heads) if one.role not in _SYSTEM), len(heads))
    first = range(num_first)
    asked = range(0)
    """Where the user's last words are."""
    is_open: set[Any] = set()
    for place in range(num_first, len(heads)):
        one, rest = heads[place], range(place, len(heads))
        is_asking = one.role == "user"
        begins = is_asking or _begins_turn(heads, place)
        is_cut = place > num_first and not is_open and begins
        if is_cut:
            yield Way(first, range(0) if is_asking else asked, rest)
        if is_asking:  # Words before a cut do not come back.
            goes_on = not is_cut and place > num_first and heads[place - 1].role == "user"
            asked = range(asked.start if goes_on else place, place + 1)
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


def _in_steps(ways: Iterable[Way], ends: Sequence[int], step: int) -> Iterator[Way]:
    """Yields the first way of each step of what is left out, and the last of all; `ends` are sums
    of the items' sizes."""
    newest, number, is_told = None, 0, True
    for way in ways:
        num_left_out = ends[-1] - sum(ends[run.stop] - ends[run.start] for run in way)
        newest, is_told = way, num_left_out // step > number
        if is_told:
            number = num_left_out // step
            yield way
    if newest is not None and not is_told:
        yield newest


async def _num_tokens(state: ServerState, body: ResponsesRequest) -> int:
    """Returns the length of a prompt; one that cannot fit is not tokenised."""
    try:
        rendered = body.chat.rendered or render(state.engine.tokenizer, body.chat)
        return len(await state.tokenising.encode_rendered(rendered))
    except ContextLengthError:
        return state.engine.max_model_len + 1
