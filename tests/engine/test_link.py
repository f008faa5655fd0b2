"""A front end's side of the conversation with an engine: what is said together, and in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from octavo.engine.ipc import (
    AbortSequence,
    AddRequests,
    Deltas,
    ToEngine,
    decode_request,
    decode_to_engine,
)
from octavo.engine.link import MAX_TOGETHER, EngineLink
from octavo.errors import EngineDeadError, OctavoError
from octavo.request import Request, SamplingParams, pack_ids


class Owner:
    def on_deltas(self, message: Deltas) -> None: ...

    def on_failed(self, request_id: str, error: OctavoError) -> None: ...

    def on_death(self, error: EngineDeadError) -> None: ...


class Listener:
    """The engine's inbox."""

    def __init__(self, link: EngineLink, folder: Path) -> None:
        self.link = link
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        addresses = f"ipc://{folder}/in", f"ipc://{folder}/out"
        link.bind(*addresses)
        self._inbox.connect(addresses[0])

    def read(self) -> ToEngine:
        assert self._inbox.poll(10_000), "nothing came"
        return decode_to_engine(self._inbox.recv())

    def read_ids(self) -> list[str]:
        message = self.read()
        assert isinstance(message, AddRequests)
        return [decode_request(data).request_id for data in message.requests]

    @property
    def is_empty(self) -> bool:
        return not self._inbox.poll(50)

    def close(self) -> None:
        self.link.close()
        self._context.destroy(linger=0)


@asynccontextmanager
async def listening(folder: Path) -> AsyncIterator[Listener]:
    listener = Listener(EngineLink(Owner(), 0, lambda _: None), folder)
    while True:  # nobody is there until the connection is made
        try:
            listener.link.abort("none")
            break
        except EngineDeadError:
            await asyncio.sleep(0.01)
    assert isinstance(listener.read(), AbortSequence)
    try:
        yield listener
    finally:
        listener.close()


def request(number: int, **params: object) -> Request:
    return Request(
        request_id=f"0-{number}",
        packed_prompt=pack_ids([1, number]),
        params=SamplingParams(**params),  # type: ignore[arg-type]
    )


def test_requests_of_one_round_are_one_message(tmp_path: Path) -> None:
    async def talk() -> None:
        async with listening(tmp_path) as engine:
            for number in range(5):
                engine.link.add(request(number))
            await asyncio.sleep(0)
            assert engine.read_ids() == [f"0-{number}" for number in range(5)]
            engine.link.add(request(5))
            await asyncio.sleep(0)
            assert engine.read_ids() == ["0-5"]
            assert engine.is_empty

    asyncio.run(talk())


def test_many_requests_of_one_round_are_not_held_to_its_end(tmp_path: Path) -> None:
    async def talk() -> None:
        async with listening(tmp_path) as engine:
            for number in range(MAX_TOGETHER + 1):
                engine.link.add(request(number))
            assert len(engine.read_ids()) == MAX_TOGETHER
            await asyncio.sleep(0)
            assert engine.read_ids() == [f"0-{MAX_TOGETHER}"]

    asyncio.run(talk())


def test_an_abort_comes_behind_the_request_that_it_ends(tmp_path: Path) -> None:
    async def talk() -> None:
        async with listening(tmp_path) as engine:
            engine.link.add(request(0))
            engine.link.abort("0-0")
            engine.link.add(request(1))
            assert engine.read_ids() == ["0-0"]
            assert engine.read() == AbortSequence("0-0")
            await asyncio.sleep(0)
            assert engine.read_ids() == ["0-1"]

    asyncio.run(talk())


def test_a_request_that_cannot_be_written_harms_no_other(tmp_path: Path) -> None:
    async def talk() -> None:
        async with listening(tmp_path) as engine:
            engine.link.add(request(0))
            with pytest.raises(UnicodeEncodeError):
                engine.link.add(request(1, stop="\ud800"))
            engine.link.add(request(2))
            await asyncio.sleep(0)
            assert engine.read_ids() == ["0-0", "0-2"]

    asyncio.run(talk())


def test_what_waits_is_not_sent_to_a_dead_engine(tmp_path: Path) -> None:
    async def talk() -> None:
        async with listening(tmp_path) as engine:
            engine.link.add(request(0))
            engine.link.die(EngineDeadError("gone"))
            await asyncio.sleep(0)
            assert engine.is_empty
            with pytest.raises(EngineDeadError, match="gone"):
                engine.link.add(request(1))

    asyncio.run(talk())
