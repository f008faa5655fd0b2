"""The events of a message, however an answer comes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import RequestError
from octavo.outputs import OutputDelta
from octavo.server.message_answers import MessageEvents, call_input, whole_message
from octavo.server.protocol.message_blocks import chat_messages
from octavo.server.protocol.signatures import MAX_THINKING_BYTES, signature_of
from tests.server.message_tools import CALL, head_of

PARTS = st.sampled_from(
    (
        "<think>",
        "</think>",
        CALL,
        "<tool_call>",
        "</tool_call>",
        '{"name": "get_weather"',
        "a",
        "\n",
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, max_size=8), st.data(), st.booleans())
def test_events_are_well_formed_however_an_answer_comes(
    parts: list[str], data: st.DataObject, hides: bool
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    reason = data.draw(st.sampled_from(("stop", "length")))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    deltas = [OutputDelta(index=0, text=piece) for piece in pieces]
    deltas[-1].finish_reason = reason
    head = head_of("a", hides_thinking=hides)
    writer = MessageEvents(head)
    wire = b"".join([writer.events([("", delta, False)]) for delta in deltas])  # type: ignore[list-item]
    wire += asyncio.run(writer.end())
    joined = read_events(wire)
    whole = whole_message(head, OutputDelta(index=0, text=text, finish_reason=reason))
    for message in (joined, whole):
        for block in message["content"]:
            block.pop("id", None)
    assert joined["content"] == whole["content"]
    assert joined["stop_reason"] == whole["stop_reason"]


def read_events(wire: bytes) -> dict[str, Any]:
    """Returns the message that a stream tells, after its rules: what is not allowed raises."""
    events = []
    for lines in wire.decode().strip().split("\n\n"):
        name, data = lines.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    message, open_index = events[0]["message"], None
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_index is None
            assert event["index"] == len(message["content"])
            open_index = event["index"]
            message["content"].append(event["content_block"] | {"pieces": ""})
        elif event["type"] == "content_block_stop":
            block = message["content"][open_index]
            pieces = block.pop("pieces")
            if block["type"] == "tool_use":
                block["input"] = call_input(pieces)
            assert open_index == event["index"]
            open_index = None
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_index
            add(message["content"][open_index], event["delta"])
        else:
            assert event["type"] == "ping"
    assert open_index is None
    return message | events[-2]["delta"]


def add(block: dict[str, Any], delta: dict[str, Any]) -> None:
    kind = delta["type"]
    wanted = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "thinking"}
    assert block["type"] == wanted.get(kind, "tool_use")
    assert not block.get("signature"), "nothing comes behind a signature"
    if kind == "input_json_delta":
        block["pieces"] += delta["partial_json"]
    else:
        name = kind.removesuffix("_delta")
        assert delta[name]
        block[name] += delta[name]


def test_a_stream_that_has_nothing_to_tell_says_that_it_lives() -> None:
    now = [100.0]
    writer = MessageEvents(head_of("a", hides_thinking=True), lambda: now[0])

    def told(text: str) -> bytes:
        return writer.events([("", OutputDelta(index=0, text=text), False)])  # type: ignore[list-item]

    assert told("<think>").count(b"event: ping") == 1
    told("hm")
    now[0] += 5
    assert told("hm") == b""
    now[0] += 6
    assert told("hm") == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert told("hm") == b""


def test_a_signature_that_holds_too_much_or_nothing_is_refused() -> None:
    other = signature_of("a").split(".")[1]
    carrying = signature_of("b", carries_text=True).split(".")[2]
    large = signature_of("b" * (MAX_THINKING_BYTES + 1), carries_text=True)
    for signature in ("octavo1.", "octavo1.aa.!!", f"octavo1.{other}.{carrying}", large):
        block = {"type": "thinking", "thinking": "", "signature": signature}
        with pytest.raises(RequestError, match="signature"):
            chat_messages([{"role": "assistant", "content": [block]}])
