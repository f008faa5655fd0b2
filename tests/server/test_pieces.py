"""Large answers are written in pieces, and are the JSON that they would have been whole."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from octavo.server.pieces import SLICE_SECONDS, Later, Lazy, pieces_of, sliced


def whole(value: Any) -> Any:
    return json.loads(b"".join(pieces_of(value)))


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_lazy_lists_are_written_as_lists(count: int, batch: int) -> None:
    value = {"a": Lazy(range(count), batch), "b": [Lazy(iter(["x"]), batch), None], "c": "\x00"}
    assert whole(value) == {"a": [*range(count)], "b": [["x"], None], "c": "\x00"}


def test_lazy_lists_hold_lazy_lists_and_what_is_known_at_the_end() -> None:
    total = []

    def rows() -> Iterator[Any]:
        for row in range(3):
            total.append(row)
            yield {"row": Lazy(range(row))}

    value = {"rows": Lazy(rows()), "total": Later(lambda: {"sum": sum(total)})}
    assert whole(value) == {
        "rows": [{"row": []}, {"row": [0]}, {"row": [0, 1]}],
        "total": {"sum": 3},
    }


def test_what_has_no_lazy_list_is_one_piece_as_ever() -> None:
    value = {"a": [1, 2.5, None, "\u00e4"], "b": {}}
    assert list(pieces_of(value)) == [msgspec.json.encode(value)]


def test_what_json_cannot_say_is_an_error() -> None:
    with pytest.raises(TypeError, match="object"):
        list(pieces_of({"a": object()}))


async def test_others_have_their_turn_between_the_pieces() -> None:
    def rows() -> Iterator[int]:
        for row in range(20):
            end = time.thread_time() + SLICE_SECONDS / 2
            while time.thread_time() < end:
                pass
            yield row

    turns, is_over = 0, False

    async def others() -> None:
        nonlocal turns
        while not is_over:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(others())
    text = b"".join([piece async for piece in sliced(pieces_of({"rows": Lazy(rows())}))])
    is_over = True
    await task
    assert json.loads(text) == {"rows": [*range(20)]}
    assert turns >= 5
