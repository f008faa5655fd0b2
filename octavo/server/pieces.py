"""Large answers, written piece by piece: no list of them is ever whole, none holds the event loop.

Used by the routes and by `streaming`: a value that holds `Lazy` lists is encoded as they are made,
and whoever sends it lets others run between the pieces. Owns no format of an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Any

import msgspec

SLICE_SECONDS = 0.004
"""CPU time after which others have their turn."""
PIECE_BYTES = 64 * 1024
"""What is sent at once."""

_MARK = f"\x00{secrets.token_hex(16)}\x00"
"""Stands for what is written later; no client can know it."""
_ENCODED_MARK = msgspec.json.encode(_MARK)


class Lazy:
    """A list whose elements are made when they are written, and so can be written once only.

    Not a dataclass: those are encoded as objects.
    """

    __slots__ = ("batch", "elements")

    def __init__(self, elements: Iterable[Any], batch: int = 1) -> None:
        """`batch` elements are encoded at once; only with 1 may they hold lazy lists, too."""
        self.elements = elements
        self.batch = batch


class Later:
    """A value that is known when all before it is written."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def pieces_of(value: Any) -> Iterator[bytes]:
    """Yields the JSON of `value`, in pieces that each take little time to make."""
    held: list[Lazy | Later] = []

    def hold(one: Any) -> Any:
        if not isinstance(one, Lazy | Later):
            raise TypeError(f"{type(one).__name__} cannot be written as JSON")
        held.append(one)
        return _MARK

    data = msgspec.json.encode(value, enc_hook=hold)
    if not held:
        yield data
        return
    for part, one in itertools.zip_longest(data.split(_ENCODED_MARK), held):
        yield part
        if isinstance(one, Later):
            yield from pieces_of(one.make())
        elif one is not None:
            yield from _list_pieces(one)


def _list_pieces(lazy: Lazy) -> Iterator[bytes]:
    elements, is_first = iter(lazy.elements), True
    while batch := list(itertools.islice(elements, lazy.batch)):
        yield b"[" if is_first else b","
        is_first = False
        if lazy.batch == 1:
            yield from pieces_of(batch[0])
        else:
            yield msgspec.json.encode(batch)[1:-1]
    yield b"[]" if is_first else b"]"


async def sliced(pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yields the pieces joined to larger ones, and lets others run between them."""
    joined, size, begun = [], 0, time.thread_time()
    for piece in pieces:
        joined.append(piece)
        size += len(piece)
        is_long = time.thread_time() - begun > SLICE_SECONDS
        if size >= PIECE_BYTES or is_long:
            yield b"".join(joined)
            joined, size = [], 0
        if is_long:
            await asyncio.sleep(0)
            begun = time.thread_time()
    yield b"".join(joined)
