"""Held-back answers under random driving: what is allowed comes out, once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import OctavoError
from octavo.guard import Refuse
from octavo.outputs import OutputDelta
from octavo.request import FinishReason
from octavo.server.errors import ApiError
from octavo.server.guards.call import CallGuard, ShownMarks
from octavo.server.guards.outputs import HeldOutput

NO_MARKS = ShownMarks(None, cast(Any, None))


class Judge:
    """Takes random time, writes every letter large, refuses what has an x, fails at a y."""

    def __init__(self, delays: Sequence[int]) -> None:
        self._delays = [*delays]
        self.windows: dict[int, list[str]] = {}
        self.num_running: dict[int, int] = {}

    async def output(
        self, delta: OutputDelta, index: int, before: str, marks: ShownMarks
    ) -> OutputDelta | Refuse:
        assert not self.num_running.get(index), "a sequence has a check at a time"
        assert before == "".join(self.windows.get(index, ())).upper()
        self.num_running[index] = 1
        for _ in range(self._delays.pop() if self._delays else 0):
            await asyncio.sleep(0)
        self.num_running[index] = 0
        if "y" in delta.text:
            raise ApiError(503, "gone")
        if "x" in delta.text:
            return Refuse("an x")
        self.windows.setdefault(index, []).append(delta.text)
        delta.text = delta.text.upper()
        return delta


def expected(text: str, windows: Sequence[str]) -> tuple[str, str]:
    """Returns what comes of an answer without a y, and why it ends."""
    if "x" not in text:
        return text.upper(), "length"
    assert "".join(windows) == text[: len("".join(windows))]
    return "".join(windows).upper(), "content_filter"


letters = st.text("abx", max_size=12)


@given(
    texts=st.lists(letters, min_size=1, max_size=3),
    window=st.integers(0, 5),
    delays=st.lists(st.integers(0, 4), max_size=20),
    turns=st.lists(st.integers(0, 2), max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_what_comes_out_is_what_is_allowed_once_and_in_order(
    texts: list[str], window: int, delays: list[int], turns: list[int]
) -> None:
    asyncio.run(drive(texts, window, delays, turns))


async def drive(texts: list[str], window: int, delays: list[int], turns: list[int]) -> None:
    judge, told, failed = Judge(delays), [[] for _ in texts], list[OctavoError]()
    ends: list[tuple[int, bool]] = []

    def pass_on(delta: OutputDelta, finished: bool) -> None:
        assert not (ends and ends[-1][1]), "nothing comes behind the last"
        told[delta.index].append(delta)
        if delta.finish_reason is not None:
            ends.append((delta.index, finished))

    held = HeldOutput(
        cast(CallGuard, judge),
        NO_MARKS,
        first_index=0,
        num_sequences=len(texts),
        window=window,
        pass_on=pass_on,
        fail=failed.append,
    )
    news = [[*text, None] for text in texts]
    while any(news):
        place = (turns.pop() if turns else 0) % len(news)
        place = place if news[place] else next(n for n, one in enumerate(news) if one)
        letter = news[place].pop(0)
        is_last = not news[place]
        reason = FinishReason.LENGTH.value if is_last else None
        held.take(OutputDelta(index=place, text=letter or "", token_ids=(1,), finish_reason=reason))
        if turns and turns[-1]:
            await asyncio.sleep(0)
    for _ in range(200):
        await asyncio.sleep(0)
    assert not failed
    assert [finished for _, finished in ends] == [False] * (len(texts) - 1) + [True]
    assert sorted(index for index, _ in ends) == list(range(len(texts)))
    for index, text in enumerate(texts):
        windows = judge.windows.get(index, [])
        said = "".join(one.text for one in told[index])
        assert (said, told[index][-1].finish_reason) == expected(text, windows)
        assert all(len(one) >= window for one in windows[:-1]) or not window
        if told[index][-1].finish_reason == "length":
            assert sum(len(one.token_ids) for one in told[index]) == len(text) + 1


async def test_a_guard_that_fails_ends_the_request_once() -> None:
    failed, told = list[OctavoError](), list[OutputDelta]()
    held = HeldOutput(
        cast(CallGuard, Judge([0, 3])),
        NO_MARKS,
        first_index=0,
        num_sequences=2,
        window=1,
        pass_on=lambda delta, finished: told.append(delta),
        fail=failed.append,
    )
    for index, text in ((0, "a"), (1, "y")):
        held.take(OutputDelta(index=index, text=text, token_ids=(1,)))
    for _ in range(20):
        await asyncio.sleep(0)
        held.take(OutputDelta(index=0, text="b", token_ids=(1,)))
    assert [str(one) for one in failed] == ["gone"]
    assert not told


async def test_nothing_comes_once_it_is_closed() -> None:
    told: list[Any] = []
    judge = Judge([5])
    held = HeldOutput(
        cast(CallGuard, judge),
        NO_MARKS,
        first_index=0,
        num_sequences=1,
        window=1,
        pass_on=lambda *news: told.append(news),
        fail=told.append,
    )
    held.take(OutputDelta(index=0, text="a", token_ids=(1,)))
    await asyncio.sleep(0)
    held.close()
    held.take(OutputDelta(index=0, text="b", token_ids=(1,), finish_reason="stop"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not told


def test_marks_are_shown_and_come_back() -> None:
    tokenizer: Any = SimpleNamespace(decode=lambda ids, _: {7: "<call>", 8: "</call>"}[ids[0]])
    marks = ShownMarks({7: "\udc00", 8: "\udc01"}, tokenizer)
    text = "a\udc00{}\udc01\u00e4"
    assert marks.show(text) == "a<call>{}</call>\u00e4"
    assert marks.bind(marks.show(text)) == text
