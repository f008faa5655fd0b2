"""News waits for its reader, merged; a reader that never comes costs a bounded amount."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from octavo.engine.mailbox import TURNS_AT_ONCE, Inbox, Mailbox, News, Turns
from octavo.errors import EngineDeadError, SlowReaderError
from octavo.outputs import MAX_GROWN_TOKENS, OutputDelta


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


async def test_a_reader_gets_news_as_they_come_until_it_refuses():
    turns = Turns()
    mailbox, taken = Mailbox(turns=turns), []

    def read(news: list[News]) -> bool:
        text = "".join(added.text for _, added, _ in news)
        if text.startswith("stop"):
            return False
        taken.append(text)
        return True

    waiting = asyncio.create_task(mailbox.take(read))
    await asyncio.sleep(0)
    for texts in (("a", "b"), ("c",), ("stop", "!")):
        assert not waiting.done()
        for text in texts:
            mailbox.put(0, delta(text), False)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert [added.text for _, added, _ in await waiting] == ["stop!"]
    assert taken == ["ab", "c"]


async def test_what_a_reader_raises_and_the_error_of_a_request_end_the_reading():
    def break_down(news: list[News]) -> bool:
        raise ValueError("broken")

    mailbox = Mailbox(turns=Turns())
    waiting = asyncio.create_task(mailbox.take(break_down))
    await asyncio.sleep(0)
    mailbox.put(0, delta("a"), False)
    with pytest.raises(ValueError, match="broken"):
        await waiting
    waiting = asyncio.create_task(mailbox.take(lambda news: True))
    await asyncio.sleep(0)
    mailbox.fail(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError):
        await waiting


async def test_a_reader_that_takes_nothing_any_more_is_not_asked():
    mailbox = Mailbox(turns=Turns())
    waiting = asyncio.create_task(mailbox.take(lambda news: pytest.fail("asked")))
    await asyncio.sleep(0)
    mailbox.put(0, delta("a"), False)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0)
    assert [added.text for _, added, _ in await mailbox.take()] == ["a"]


async def test_turns_let_others_run_in_between():
    turns, calls = Turns(), []
    for place in range(3 * TURNS_AT_ONCE):
        turns.add(lambda place=place: calls.append(place))
    asyncio.get_running_loop().call_soon(calls.append, -1)
    for _ in range(4):
        await asyncio.sleep(0)
    assert calls.index(-1) == TURNS_AT_ONCE
    assert [place for place in calls if place >= 0] == list(range(3 * TURNS_AT_ONCE))


async def test_whoever_waits_for_a_turn_gets_it_after_those_before():
    turns, order = Turns(at_once=2), []

    async def wait(place: int) -> None:
        await turns.wait()
        order.append(place)

    tasks = [asyncio.create_task(wait(place)) for place in range(5)]
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 2, 3, 4]


async def test_turns_of_many_are_more_in_a_round_up_to_a_limit():
    turns, calls = Turns(at_once=2, most=8), []
    for place in range(200):
        turns.add(lambda place=place: calls.append(place))
    rounds = []
    while len(calls) < 200:
        before = len(calls)
        await asyncio.sleep(0)
        rounds.append(len(calls) - before)
    assert rounds[0] == max(rounds) == 8
    assert rounds[-3:-1] == [2, 2]
    assert calls == list(range(200))


async def test_an_answer_that_ends_is_read_before_those_that_go_on():
    turns, order = Turns(), []
    mailboxes = [Mailbox(turns=turns) for _ in range(4)]

    def reader(place: int) -> Any:
        return lambda news: not order.append((place, "".join(d.text for _, d, _ in news)))

    waiting = [asyncio.create_task(m.take(reader(i))) for i, m in enumerate(mailboxes)]
    await asyncio.sleep(0)
    for mailbox in mailboxes:
        mailbox.put(0, delta("a"), False)
    mailboxes[2].put(0, delta("!", finish_reason="stop"), True)
    mailboxes[3].put(0, delta("b"), False)
    for _ in range(3):
        await asyncio.sleep(0)
    assert order == [(2, "a!"), (0, "a"), (1, "a"), (3, "ab")]
    # Its turn has been: the one that it had before is none.
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()


async def test_what_waits_may_grow_until_it_is_read():
    mailbox = Mailbox(max_waiting_tokens=3, grows=True)
    added = delta("a")
    mailbox.put(0, added, False)
    assert added.is_waiting
    assert added.grow((2, 3), "b", 5.0)
    assert mailbox.grow(2)
    [(_, taken, _)] = await mailbox.take()
    assert (taken.text, list(taken.token_ids), taken.time) == ("ab", [1, 2, 3], 5.0)
    assert not taken.is_waiting
    Mailbox().put(0, added, False)
    assert not added.is_waiting
    mailbox.put(0, delta("c"), False)
    assert mailbox.grow(2)
    assert not mailbox.grow(1)
    with pytest.raises(SlowReaderError):
        await mailbox.take()


def test_a_delta_grows_to_a_bound():
    added = delta()
    while added.grow((2,), "x", 1.0):
        assert len(added.token_ids) <= MAX_GROWN_TOKENS
    assert (len(added.token_ids), added.text) == (MAX_GROWN_TOKENS, "x" * (MAX_GROWN_TOKENS - 1))
