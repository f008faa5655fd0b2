"""What every stream of a response keeps to, and what a client puts together of it."""

from __future__ import annotations

import json
from typing import Any

LAST = {"response.completed", "response.incomplete", "response.failed"}
TEXTS = {
    "response.output_text": ("content", "text"),
    "response.reasoning_text": ("content", "text"),
    "response.function_call_arguments": (None, "arguments"),
    "response.custom_tool_call_input": (None, "input"),
}
"""By the beginning of an event's type: where an item has what its deltas join to."""


def parsed(text: str) -> list[dict[str, Any]]:
    """Returns the events of a stream; each has its type on a line of its own, too."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        found.append(event)
    return found


def checked(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the response at the end of a stream, after looking at all that led to it."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert [kind in LAST for kind in kinds] == [False] * (len(kinds) - 1) + [True]
    assert events[0]["response"]["output"] == []
    last = events[-1]["response"]
    assert kinds[-1] == f"response.{last['status']}"
    assert {event["response"]["id"] for event in events if "response" in event} == {last["id"]}
    items: list[list[dict[str, Any]]] = []
    for event in events[2:-1]:
        if event["type"] == "error":
            continue
        if event["type"] == "response.output_item.added":
            assert not items or items[-1][-1]["type"] == "response.output_item.done"
            items.append([])
        assert event["output_index"] == len(items) - 1
        items[-1].append(event)
    assert [_item(own) for own in items] == last["output"]
    return last


def _item(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns an item after looking at its events."""
    added, done = events[0]["item"], events[-1]["item"]
    assert added["status"] == "in_progress"
    same = ("id", "type", "call_id", "name", "role")
    assert [added.get(name) for name in same] == [done.get(name) for name in same]
    begin = next(
        kind
        for kind in TEXTS
        if events[-2]["type"].startswith(kind)
        or (
            events[-2]["type"] == "response.content_part.done"
            and events[-3]["type"].startswith(kind)
        )
    )
    where, name = TEXTS[begin]
    middle = events[1:-1]
    if where is not None:
        opened, *middle, closed = middle
        assert opened["type"] == "response.content_part.added"
        assert closed["type"] == "response.content_part.done"
        assert opened["part"][name] == ""
        assert [closed["part"]] == done[where]
    *deltas, end = middle
    assert {event["type"] for event in deltas} <= {f"{begin}.delta"}
    assert end["type"] == f"{begin}.done"
    assert {event["item_id"] for event in events[1:-1]} == {done["id"]}
    whole = done if where is None else done[where][0]
    assert "".join(event["delta"] for event in deltas) == end[name] == whole[name]
    logprobs = [one for event in deltas for one in event.get("logprobs", ())]
    assert logprobs == whole.get("logprobs", [])
    return done
