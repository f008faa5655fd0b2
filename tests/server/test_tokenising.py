"""Texts become ids without holding the loop; what cannot fit is refused by its length."""

from __future__ import annotations

import asyncio
import threading
from array import array

import pytest

from octavo.errors import ContextLengthError, OverloadedError
from octavo.server import tokenising
from octavo.server.protocol.chat import ChatRequest
from octavo.server.tokenising import SHORT_CHARS, Tokenising
from tests.server.fake_engine import FakeEngine


class LongEngine(FakeEngine):
    max_model_len = 100_000


def chat(text: str) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": text}]})


async def test_ids_come_packed_in_the_order_of_the_texts() -> None:
    ways = Tokenising(LongEngine())
    found = await ways.encode(["ab", "c" * (SHORT_CHARS + 1)], add_special_tokens=False)
    assert [list(ids) for ids in found] == [[97, 98], [99] * (SHORT_CHARS + 1)]
    assert isinstance(found[0], array)


async def test_a_text_longer_than_the_context_can_spell_is_not_tokenised() -> None:
    engine = FakeEngine()
    engine.tokenizer.encode = None  # type: ignore[method-assign,assignment]
    ways = Tokenising(engine)
    for work in (ways.encode(["x" * 513]), ways.encode_chat(chat("x" * 513))):
        with pytest.raises(ContextLengthError, match="512"):
            await work
    with pytest.raises(ContextLengthError, match="513 characters"):
        await ways.encode(["x", "x" * 513])


async def test_no_length_is_refused_where_a_token_may_stand_for_any_number_of_characters() -> None:
    engine = FakeEngine()
    engine.tokenizer.longest_spelling = None  # type: ignore[assignment]
    assert len((await Tokenising(engine).encode(["x" * 9999]))[0]) == 10_000


async def test_long_texts_are_tokenised_beside_the_loop_and_leave_a_thread_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = LongEngine()
    ways, encode, go = Tokenising(engine), engine.tokenizer.encode, threading.Event()
    monkeypatch.setattr(tokenising, "LONG_CHARS", SHORT_CHARS + 10)

    def slow(text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > SHORT_CHARS + 10:
            assert go.wait(10)
        return encode(text, add_special_tokens)

    engine.tokenizer.encode = slow  # type: ignore[method-assign]
    long = [asyncio.ensure_future(ways.encode(["x" * (SHORT_CHARS + 20)])) for _ in range(9)]
    await asyncio.sleep(0)
    short, middle = await ways.encode(["a"]), await ways.encode(["a" * (SHORT_CHARS + 1)])
    assert len(short[0]) == 2
    assert len(middle[0]) == SHORT_CHARS + 2
    assert not any(one.done() for one in long)
    go.set()
    await asyncio.gather(*long)


async def test_texts_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "MAX_WAITING_CHARS", 3 * SHORT_CHARS)
    ways, text = Tokenising(LongEngine()), "x" * (2 * SHORT_CHARS)
    first = asyncio.ensure_future(ways.encode([text]))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await ways.encode([text])
    await first
    await ways.encode([text])


async def test_long_ids_are_spelt_beside_the_loop() -> None:
    ways = Tokenising(LongEngine())
    for size in (3, SHORT_CHARS + 1):
        assert await ways.decode([97] * size) == "a" * size
        assert await ways.tokens([97] * size) == ["a"] * size
