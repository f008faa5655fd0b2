"""News waits for its reader, merged; a reader that never comes costs a bounded amount."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from octavo.engine.mailbox import Inbox, Mailbox
from octavo.errors import EngineDeadError, SlowReaderError
from octavo.outputs import OutputDelta


def delta(text: str = "", index: int = 0, ids: tuple[int, ...] = (1,), **more: Any) -> OutputDelta:
    return OutputDelta(index=index, text=text, token_ids=ids, **more)


async def test_news_of_one_sequence_come_as_one():
    mailbox = Mailbox()
    first, second = Inbox(mailbox, 0), Inbox(mailbox, 1)
    first.receive(delta("a", num_cached_tokens=3, scheduled_time=1.0), False)
    second.receive(delta("x"), False)
    first.receive(delta("b", ids=(2, 3), finish_reason="stop"), True)
    (tag, added, finished), (last, merged, ended) = await mailbox.take()
    assert (tag, added.text, finished) == (1, "x", False)
    assert (last, merged.text, list(merged.token_ids), ended) == (0, "ab", [1, 2, 3], True)
    assert (merged.finish_reason, merged.num_cached_tokens) == ("stop", 3)
    assert merged.scheduled_time == 1.0


async def test_a_reader_waits_for_news_and_for_an_error():
    mailbox = Mailbox()
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    assert not reader.done()
    mailbox.put(0, delta("a"), False)
    assert [d.text for _, d, _ in await reader] == ["a"]
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.fail(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError, match="gone"):
        await reader


async def test_news_before_an_error_are_read_first():
    mailbox = Mailbox()
    mailbox.put(0, delta("a"), False)
    mailbox.fail(EngineDeadError("gone"))
    mailbox.put(0, delta("too late"), False)
    assert [d.text for _, d, _ in await mailbox.take()] == ["a"]
    with pytest.raises(EngineDeadError):
        await mailbox.take()


async def test_a_reader_too_far_behind_is_given_up():
    mailbox = Mailbox(max_waiting_tokens=10)
    assert all(mailbox.put(0, delta("a"), False) for _ in range(10))
    assert not mailbox.put(0, delta("a"), False)
    assert mailbox._news == []
    with pytest.raises(SlowReaderError, match="more than 10 tokens behind"):
        await mailbox.take()


async def test_a_reader_that_keeps_up_is_never_given_up():
    mailbox = Mailbox(max_waiting_tokens=10)
    for _ in range(100):
        assert all(mailbox.put(0, delta("a"), False) for _ in range(9))
        await mailbox.take()
