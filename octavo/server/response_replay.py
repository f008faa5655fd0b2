"""A stored response told as a stream: its events again, each text in one piece.

Called by the route that retrieves responses. The numbers of events are the same each time, so that
a client can go on behind the last one that it has seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import msgspec

from octavo.server.response_output import IN_PROGRESS, INCOMPLETE, Event
from octavo.server.stored_responses import CANCELLED, LOOK_SECONDS, StoredResponse

Look = Callable[[], Awaitable[StoredResponse]]
_GIVEN = {
    "function_call": ("arguments", "function_call_arguments"),
    "custom_tool_call": ("input", "custom_tool_call_input"),
}


async def replay(
    first: StoredResponse, look: Look, starting_after: int
) -> AsyncGenerator[bytes, None]:
    """Yields the events behind number `starting_after`; waits until the response has ended."""
    number = -1
    stored = first

    def told(event: Event) -> bytes:
        nonlocal number
        number += 1
        if number <= starting_after:
            return b""
        data = msgspec.json.encode({**event, "sequence_number": number})
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)

    begun = msgspec.json.decode(first.response) | {
        "status": IN_PROGRESS,
        "output": [],
        **dict.fromkeys(("completed_at", "error", "incomplete_details", "usage")),
    }
    yield b"".join(told({"type": f"response.{k}", "response": begun}) for k in _BEGINNING)
    while stored.status == IN_PROGRESS:
        await asyncio.sleep(LOOK_SECONDS)
        stored = await look()
    response = msgspec.json.decode(stored.response)
    for place, item in enumerate(response["output"]):
        yield b"".join(map(told, _item_events(item, place)))
    # There is no event of its own for a response that was cancelled.
    kind = INCOMPLETE if stored.status == CANCELLED else stored.status
    yield told({"type": f"response.{kind}", "response": response})


_BEGINNING = ("created", "in_progress")


def _item_events(item: dict[str, Any], place: int) -> Iterator[Event]:
    """Yields the events of one item, as `response_output` has them."""
    kind = item["type"]
    parts = item.get("content") or []
    opened = {**item, "status": IN_PROGRESS}
    opened.pop("encrypted_content", None)
    if kind in _GIVEN:
        opened[_GIVEN[kind][0]] = ""
    else:
        opened["content"] = []
    yield {"type": "response.output_item.added", "output_index": place, "item": opened}
    at: dict[str, Any] = {"output_index": place, "item_id": item["id"]}
    for index, part in enumerate(parts):
        yield from _part_events(part, {**at, "content_index": index})
    if kind in _GIVEN:
        given, name = _GIVEN[kind]
        yield {"type": f"response.{name}.delta", **at, "delta": item[given]}
        yield {"type": f"response.{name}.done", **at, given: item[given]}
    yield {"type": "response.output_item.done", "output_index": place, "item": item}


def _part_events(part: dict[str, Any], at: dict[str, Any]) -> Iterator[Event]:
    name, text = part["type"], part["text"]
    empty = {key: [] if isinstance(one, list) else one for key, one in part.items()}
    logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
    yield {"type": "response.content_part.added", **at, "part": {**empty, "text": ""}}
    yield {"type": f"response.{name}.delta", **at, "delta": text, **logprobs}
    yield {"type": f"response.{name}.done", **at, "text": text, **logprobs}
    yield {"type": "response.content_part.done", **at, "part": part}
